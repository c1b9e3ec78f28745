"""Checkpoint folders that are complete or absent.

A checkpoint is written in a hidden folder beside its place, every file flushed to disk, then its manifest (sizes and
SHA-256 of all files), then the folder is renamed. A job killed at any moment leaves ``checkpoint-N`` either as it was
or not there, and never a half one. What happens to a disk afterwards is found by the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ldmole_ds.distributed.agreement import everyones, raise_together

MANIFEST_NAME = "manifest.json"
_CHUNK = 1 << 22


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; the message names the folder and the remedy."""


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_folder(place: Path, write: Callable[[Path], list[Path]], rank: int = 0) -> None:
    """Make the checkpoint folder ``place``, or leave everything as it was. Collective.

    Args:
        place: Of the finished checkpoint, on a file system that all ranks share.
        write: Called on every rank with the folder to write in; returns the files this rank wrote. Rank 0 answers for
            all others. Exceptions are caught and raised on all ranks.
        rank: This rank.

    Raises:
        CheckpointError: On every rank, when any could not write. Earlier checkpoints are untouched.
    """
    staging = place.with_name(f".{place.name}.saving")
    with raise_together(_unwritten(place)):
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    entries: dict[str, list] = {}
    try:
        with raise_together(_unwritten(place)):
            for path in write(staging):
                _flush(path)
                entries[str(path.relative_to(staging))] = [path.stat().st_size, _checksum(path)]
        parts = everyones(entries)
        with raise_together(_unwritten(place)):
            if rank == 0:
                _finish(staging, place, {name: entry for part in parts for name, entry in part.items()})
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _unwritten(place: Path) -> Callable[[str], CheckpointError]:
    return lambda reason: CheckpointError(
        f"{place} could not be saved: {reason}. Earlier checkpoints are as they were; make room or choose another "
        "--output_dir, and continue with --resume auto"
    )


def _finish(staging: Path, place: Path, entries: dict[str, list]) -> None:
    for path in staging.rglob("*"):
        name = str(path.relative_to(staging))
        if path.is_file() and name not in entries:
            _flush(path)
            entries[name] = [path.stat().st_size, _checksum(path)]
    for name in entries:
        if not (staging / name).is_file():
            raise OSError(f"{name} was written by another rank but cannot be seen here: --output_dir must be shared")
    (staging / MANIFEST_NAME).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    _flush(staging / MANIFEST_NAME)
    for folder in [*(p for p in staging.rglob("*") if p.is_dir()), staging]:
        _flush(folder)
    replaced = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if place.exists():
        place.rename(replaced)
    staging.rename(place)
    _flush(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(run: Path) -> None:
    """Tidy what a killed save left in a run folder: a replaced checkpoint returns, unfinished ones go. On one rank."""
    for replaced in run.glob(".checkpoint-*.replaced"):
        place = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(place)
    for staging in run.glob(".checkpoint-*.saving"):
        shutil.rmtree(staging, ignore_errors=True)


def problem_of(folder: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None if it is whole.

    Args:
        folder: ``checkpoint-N``.
        rank, world_size: Of this many readers, which reads a share of the files each.
    """
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        for number, (name, (size, checksum)) in enumerate(sorted(files.items())):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {size}"
            if number % world_size == rank and _checksum(path) != checksum:
                return f"{name} is not what was written (its checksum differs)"
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST_NAME} cannot be read ({error})"
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """All ``checkpoint-N`` folders, newest step first; their contents are not looked at."""
    steps = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*"))
    return [path for _, path in sorted(((int(m[1]), p) for m, p in steps if m and p.is_dir()), reverse=True)]
