"""Shares of a mixture, and the order in which its tasks come."""

from collections import Counter

import pytest

from ldmole_ds.tasks import DataError
from ldmole_ds.tasks.mixture import mixture_order, mixture_weights


def order(mixture, sizes):
    return mixture_order(sizes, mixture_weights(mixture, sizes))


def test_by_size_every_row_comes_once():
    found = order("size", [3, 6, 1])
    assert sorted(found) == [(task, row) for task, size in enumerate([3, 6, 1]) for row in range(size)]


def test_one_task_keeps_its_order():
    for mixture in ("size", "equal", "5"):
        assert order(mixture, [4]) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_equal_shares_repeat_small_tasks_in_order():
    found = order("equal", [2, 5])
    assert Counter(task for task, _ in found) == {0: 5, 1: 5}
    assert [row for task, row in found if task == 0] == [0, 1, 0, 1, 0]
    assert [task for task, _ in found] == [0, 1] * 5


@pytest.mark.parametrize(
    ("mixture", "sizes", "counts"),
    [
        ("1:1", [10, 10], (10, 10)),
        ("1:3", [10, 10], (10, 30)),
        ("3:1", [10, 100], (300, 100)),
        ("0.5:2", [10, 100], (25, 100)),
        ("1:2:1", [4, 4, 6], (6, 12, 6)),
    ],
)
def test_weights_leave_no_row_out(mixture, sizes, counts):
    found = order(mixture, sizes)
    assert tuple(Counter(task for task, _ in found)[task] for task in range(len(sizes))) == counts
    assert {(task, row) for task, size in enumerate(sizes) for row in range(size)} == set(found)
    # Any stretch has the tasks in their shares, up to one row.
    for task, count in enumerate(counts):
        seen = 0
        for length, (which, _) in enumerate(found, start=1):
            seen += which == task
            assert abs(seen - count * length / len(found)) <= 1 + 1e-9


@pytest.mark.parametrize("mixture", ["1:2", "half", "1:0:1", "1:-1:1", "1:nan:1", "1:inf:1", ""])
def test_mixtures_that_do_not_fit(mixture):
    with pytest.raises(DataError, match=r"does not fit 3 tasks: give equal, size, or a positive number .* as 1:2:3"):
        mixture_weights(mixture, [5, 5, 5])
