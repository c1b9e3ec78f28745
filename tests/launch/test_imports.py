"""The garbage collector rests during imports, and is then as it was."""

import gc

import pytest

from launch.imports import collector_paused


@pytest.fixture(autouse=True)
def unfreeze():
    yield
    gc.unfreeze()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_before(was_on):
    kept = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(ImportError), collector_paused():
            assert not gc.isenabled()
            import there_is_no_such_module  # noqa: F401
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if kept else gc.disable)()


def test_what_was_imported_is_left_alone():
    before = gc.get_freeze_count()
    with collector_paused():
        held = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= before + len(held)
