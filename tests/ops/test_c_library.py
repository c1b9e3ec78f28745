"""C sources that are compiled where they run."""

import ctypes
import fcntl
import os
import subprocess
import sys

import pytest

from ldmole_ds.ops import c_library
from ldmole_ds.ops.c_library import NoCompilerError

pytestmark = pytest.mark.skipif(c_library.compiler() is None, reason="needs a C compiler: install gcc or clang")
SOURCE = "int answer(void) { return %d; }"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    c_library.load.cache_clear()
    yield tmp_path / "cache" / "ldmole_ds"
    c_library.load.cache_clear()


def source(folder, text):
    path = folder / "answer.c"
    path.write_text(text)
    c_library.load.cache_clear()
    return (path,)


def test_it_is_built_once_and_again_when_the_source_changes(cache, tmp_path, monkeypatch):
    assert c_library.load(source(tmp_path, SOURCE % 42)).answer() == 42
    (built,) = cache.iterdir()
    with monkeypatch.context() as without:
        without.setattr(c_library, "_compile", lambda *args: pytest.fail("it was built before"))
        assert c_library.load(source(tmp_path, SOURCE % 42)).answer() == 42
    assert c_library.load(source(tmp_path, SOURCE % 43)).answer() == 43
    assert len(list(cache.iterdir())) == 2 and built.exists(), "nothing else is left"


@pytest.mark.parametrize("kept", [0, 9, 0.5])
def test_a_file_that_was_cut_short_is_built_again(cache, tmp_path, kept):
    """The loader of programs would end this process on one that is half there."""
    path = source(tmp_path, SOURCE % 7)
    assert c_library.load(path).answer() == 7
    (built,) = cache.iterdir()
    content, broken = built.read_bytes(), cache / "broken"
    broken.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    broken.replace(built)
    c_library.load.cache_clear()
    assert c_library.load(path).answer() == 7
    assert [file.read_bytes() for file in cache.iterdir()] == [content]


@pytest.mark.parametrize("options", ["-std=c89 -pedantic-errors", "-ffast-math"])
def test_what_a_compiler_is_told_otherwise_does_not_count(cache, tmp_path, monkeypatch, options):
    text = "float back(float x) { for (int i = 0; i < 1; i++) x = (x + 12582912.0f) - 12582912.0f; return x; }"
    monkeypatch.setenv("CC", f"{' '.join(c_library.compiler())} {options}")
    back = c_library.load(source(tmp_path, text)).back
    back.argtypes, back.restype = [ctypes.c_float], ctypes.c_float
    assert back(2.7) == 3.0


def test_a_cache_that_cannot_be_written_to(cache, tmp_path):
    cache.parent.write_text("a file where the folder should be")
    assert c_library.load(source(tmp_path, SOURCE % 5)).answer() == 5


def test_a_user_without_a_home(cache, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(c_library.Path, "home", no_home)
    assert c_library.load(source(tmp_path, SOURCE % 6)).answer() == 6


def test_why_it_cannot_be_built(cache, tmp_path, monkeypatch):
    with pytest.raises(NoCompilerError, match="could not build answer.c: .*error"):
        c_library.load(source(tmp_path, "int answer(void) { return missing; }"))
    monkeypatch.setattr(c_library, "compiler", lambda: None)
    with pytest.raises(NoCompilerError, match="there is no C compiler"):
        c_library.load(source(tmp_path, SOURCE % 1))


def test_processes_that_build_at_the_same_time(cache, tmp_path):
    (path,) = source(tmp_path, SOURCE % 9)
    program = "import sys, pathlib as p, ldmole_ds.ops.c_library as c; print(c.load((p.Path(sys.argv[1]),)).answer())"
    command = [sys.executable, "-c", program, str(path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate(timeout=100)[0].strip() for p in started] == ["9"] * 3
    assert len(list(cache.iterdir())) == 1


def test_the_first_of_them_builds_for_all(cache, tmp_path):
    """A compiler that counts its calls: one that compiles, and one that links."""
    log, compiler = tmp_path / "calls", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho called >> {log}\nsleep 0.3\nexec {" ".join(c_library.compiler())} "$@"\n')
    compiler.chmod(0o755)
    (path,) = source(tmp_path, SOURCE % 8)
    program = "import sys, pathlib as p, ldmole_ds.ops.c_library as c; print(c.load((p.Path(sys.argv[1]),)).answer())"
    command = [sys.executable, "-c", program, str(path)]
    environment = {**os.environ, "CC": str(compiler)}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    assert [p.communicate(timeout=100)[0].strip() for p in started] == ["8"] * 3
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("locks", ["held", "unknown"])
def test_nobody_waits_for_ever(cache, tmp_path, monkeypatch, locks):
    """For a process that was stopped while it built, or where the file system has no locks."""
    cache.mkdir(parents=True)
    monkeypatch.setattr(c_library, "BUILD_TIMEOUT_S", 0.2)
    descriptor = os.open(cache, os.O_RDONLY)
    if locks == "held":
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    else:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks available")))
    assert c_library.load(source(tmp_path, SOURCE % 4)).answer() == 4
    os.close(descriptor)


def test_several_sources(cache, tmp_path):
    (first,) = source(tmp_path, "int twice(int); int answer(void) { return twice(21); }")
    second, broken = tmp_path / "twice.c", tmp_path / "broken.c"
    second.write_text("int twice(int x) { return 2 * x; }")
    broken.write_text("int x = y;")
    assert c_library.load((first, second)).answer() == 42
    with pytest.raises(NoCompilerError, match="could not build answer.c: .*broken.c.*error"):
        c_library.load((first, second, broken))
    with pytest.raises(NoCompilerError, match="cannot be loaded: .*twice"):
        c_library.load((first,))
