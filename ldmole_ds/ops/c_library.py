"""C sources of this package, compiled where they run: once per source, compiler and processor, then from a cache.

``~/.cache/ldmole_ds`` (or under ``$XDG_CACHE_HOME``) holds what was built. Processors differ between machines that
share a home directory, so theirs is part of a file's name; and so is a digest of its content, because loading a file
that was cut short, as by a full disk, ends the process. It is built in a file of another name, and renamed when it is
whole. Ranks of one machine that want to build at the same time wait for the first and take what it has built.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# The standard, for compilers that are older, and arithmetic as it is written, for those that are free with it.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-fast-math", "-fno-math-errno")
COMPILE_TIMEOUT_S = 60
BUILD_TIMEOUT_S = 2 * COMPILE_TIMEOUT_S


class NoCompilerError(RuntimeError):
    """There is no C compiler, or it could not build the source."""


def compiler() -> list[str] | None:
    """The command of a C compiler: ``$CC``, or the first of cc, gcc and clang; None if there is none."""
    named = os.environ.get("CC", "").split()
    if named and shutil.which(named[0]):
        return named
    return next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


@functools.cache
def load(sources: tuple[Path, ...]) -> ctypes.CDLL:
    """The library made of these files, headers among them; the first one names it.

    Raises:
        NoCompilerError: It was not built before and cannot be built; says why.
    """
    command = compiler()
    parts = (*(source.read_text() for source in sources), " ".join(command or ()), " ".join(FLAGS), _processor())
    name = f"{sources[0].stem}-{_digest('|'.join(parts).encode())}"
    for folder in dict.fromkeys((_cache(), None)):
        try:
            return _load_or_build(sources, command, name, folder)
        except OSError as error:  # a home that cannot be written to, or programs there must not run
            reason = error
    raise NoCompilerError(f"{sources[0].name} was compiled but cannot be loaded: {reason}")


def _load_or_build(sources: tuple[Path, ...], command: list[str] | None, name: str, folder: Path | None) -> ctypes.CDLL:
    library = _find(name, folder)
    if library is not None:
        return library
    if command is None:
        raise NoCompilerError("there is no C compiler (cc, gcc, clang, or $CC)")
    if folder is None:
        return _build(sources, command, name, None)
    folder.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder):
        return _find(name, folder) or _build(sources, command, name, folder)


def _find(name: str, folder: Path | None) -> ctypes.CDLL | None:
    for built in sorted(folder.glob(f"{name}-*.so")) if folder is not None else ():
        try:
            if built.stem == f"{name}-{_digest(built.read_bytes())}":
                return ctypes.CDLL(str(built))
        except OSError:  # of another system: built again
            pass
    return None


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Others who build in this folder wait, but not longer than a build may take."""
    descriptor, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + BUILD_TIMEOUT_S
    try:
        while not _lock(descriptor) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Until it is closed; False while another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # not every file system has locks: then all build
        pass
    return True


def _build(sources: tuple[Path, ...], command: list[str], name: str, folder: Path | None) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as build:
        built = Path(build) / "library.so"
        _compile(command, sources, built)
        library = ctypes.CDLL(str(built))
        if folder is not None:
            os.replace(built, folder / f"{name}-{_digest(built.read_bytes())}.so")
        return library


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compile(command: list[str], sources: tuple[Path, ...], target: Path) -> None:
    """Sources at the same time, since there are few and large ones."""
    objects = {target.with_name(f"{source.stem}.o"): source for source in sources if source.suffix == ".c"}
    error = None
    for native in (["-march=native"], []):  # not every compiler knows it
        commands = [[*command, *FLAGS, *native, "-c", "-o", str(o), str(source)] for o, source in objects.items()]
        error = _run(commands) or _run([[*command, "-shared", "-o", str(target), *map(str, objects), "-lm"]])
        if error is None:
            return
    raise NoCompilerError(f"the C compiler {command[0]} could not build {sources[0].name}: {error}")


def _run(commands: list[list[str]]) -> str | None:
    """All of them at once; a line that says what went wrong."""
    with ExitStack() as running:
        started = []
        try:
            for command in commands:
                options = {
                    "stderr": subprocess.PIPE,
                    "stdout": subprocess.DEVNULL,
                    "env": {**os.environ, "LC_ALL": "C"},
                }
                started.append(running.enter_context(subprocess.Popen(command, text=True, errors="replace", **options)))
                running.callback(started[-1].kill)  # whatever happens to another
            said = [process.communicate(timeout=COMPILE_TIMEOUT_S)[1] for process in started]
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoCompilerError(f"the C compiler {commands[0][0]} did not run: {error}") from error
    for process, text in zip(started, said, strict=True):
        if process.returncode:
            lines = [line for line in text.splitlines() if "error" in line]
            return lines[0] if lines else f"exit status {process.returncode}"
    return None


def _cache() -> Path | None:
    """None for a user without a home, as containers may have."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldmole_ds"
    except RuntimeError:
        return None


def _processor() -> str:
    """What ``-march=native`` may depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = ("model name", "flags", "Features", "CPU part")
    return "|".join([platform.platform(), *sorted({line for line in lines if line.startswith(kinds)})])
