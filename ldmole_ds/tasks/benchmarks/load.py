"""The rows of a task: from a folder of JSON Lines, from the hub, or from inside this package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ldmole_ds.tasks.benchmarks.registry import Task
from ldmole_ds.tasks.demo import demo_files
from ldmole_ds.tasks.item import SCORINGS, Question
from ldmole_ds.tasks.rows import DataError, Row, number_rows, read_rows


def load_task(
    task: Task,
    split: str,
    *,
    data_dir: str | Path | None = None,
    scoring: str | None = None,
    limit: int | None = None,
) -> list[Question]:
    """The questions of one split of a task.

    Args:
        task: The task.
        split: train, validation or test; also a part of it by row numbers, as `datasets` writes it: ``train[:-300]``.
        data_dir: Folder with ``<task>/<split>.jsonl``; None: the hub. A task of embedded rows need not be there.
        scoring: One of `SCORINGS`; None takes the task's own.
        limit: Only the first rows.

    Raises:
        DataError: There is no such split, or a row does not fit; the message names the place.
    """
    scoring = scoring or task.scoring
    if scoring not in SCORINGS:
        raise DataError(f"--scoring {scoring!r} is not known: use {' or '.join(SCORINGS)}")
    name, part = split_and_part(split)
    rows = _rows(task, name, Path(data_dir) if data_dir else None)[part]
    if not rows:
        raise DataError(f"task {task.name}: split {split!r} has no rows")
    return [task.read(row).as_question(scoring, task.name) for row in rows[:limit]]


def split_and_part(split: str) -> tuple[str, slice]:
    """``train[:-300]`` as ``train`` and a slice.

    Raises:
        DataError: What is in brackets is no range of row numbers.
    """
    found = re.fullmatch(r"(\w+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if found is None:
        raise DataError(f"split {split!r} is not known: use a name, or a part by row numbers such as train[:-300]")
    name, *ends = found.groups()
    return name, slice(*(int(end) if end else None for end in ends))


def load_hub_rows(name: str, config: str | None, split: str) -> Any:
    """One split of a hub dataset, as `datasets` has it.

    Raises:
        DataError: One line on why it could not be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # network, hub, parquet and file system each have their own
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"hub dataset {name!r}, split {split!r}, could not be loaded: {first}") from error


def _rows(task: Task, split: str, data_dir: Path | None) -> list[Row]:
    if data_dir is not None and (task.hub or (data_dir / task.name).is_dir()):
        return _local_rows(data_dir / task.name, split)
    if task.hub is None:
        files = demo_files()
        if split not in files:
            raise DataError(f"task {task.name} has no split {split!r}: use train, validation or test")
        return read_rows(files[split])
    name, config = task.hub
    try:
        rows = load_hub_rows(name, config, "test" if task.carve else split)
    except DataError as error:
        raise DataError(f"--task {task.name}: {error} -- give a split it has, or --data_dir") from error
    return number_rows(task.carve(rows, split) if task.carve else rows, f"{name}[{split}]")


def _local_rows(folder: Path, split: str) -> list[Row]:
    path = folder / f"{split}.jsonl"
    if path.is_file():
        return read_rows(path)
    held = sorted(file.stem for file in folder.glob("*.jsonl"))
    there = f"the folder has {', '.join(held)}" if held else "expected <data_dir>/<task>/<split>.jsonl"
    raise DataError(f"--data_dir: {path} does not exist; {there}")
