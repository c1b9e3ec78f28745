"""C sources of this package, compiled where they run: once per source, compiler and processor, then from a cache.

``~/.cache/ldmole_ds`` (or under ``$XDG_CACHE_HOME``) holds what was built. Processors differ between machines that
share a home directory, so theirs is part of a file's name; and so is a digest of its content, because loading a file
that was cut short, as by a full disk, ends the process. Ranks that build at the same time do so each in a file of its
own and rename it when it is whole.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

# The standard, for compilers that are older, and arithmetic as it is written, for those that are free with it.
FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fno-fast-math", "-fno-math-errno")
COMPILE_TIMEOUT_S = 60


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
    for built in sorted(folder.glob(f"{name}-*.so")) if folder is not None else ():
        try:
            if built.stem == f"{name}-{_digest(built.read_bytes())}":
                return ctypes.CDLL(str(built))
        except OSError:  # of another system: built again
            pass
    if command is None:
        raise NoCompilerError("there is no C compiler (cc, gcc, clang, or $CC)")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
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
    compiled, last = [str(source) for source in sources if source.suffix == ".c"], ""
    for native in (["-march=native"], []):  # not every compiler knows it
        try:
            done = subprocess.run(
                [*command, *FLAGS, *native, "-o", str(target), *compiled, "-lm"],
                capture_output=True,
                text=True,
                errors="replace",
                env={**os.environ, "LC_ALL": "C"},
                timeout=COMPILE_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoCompilerError(f"the C compiler {command[0]} did not run: {error}") from error
        if done.returncode == 0:
            return
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
        last = lines[0]
    raise NoCompilerError(f"the C compiler {command[0]} could not build {sources[0].name}: {last}")


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
