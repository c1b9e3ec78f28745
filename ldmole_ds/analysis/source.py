"""Which prompts a report is about: those of a task, of a file, or of the run that trained the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldmole_ds.tasks import load_task, tasks_of

_SETTINGS_NAME = "run_settings.json"
DEFAULT_TASK = "clinc_domains"


def training_data_settings(adapter: Path) -> dict[str, Any]:
    """The data settings of the run that trained the adapter, empty where it left no record."""
    path = adapter / _SETTINGS_NAME
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("data") or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): restore it, or remove it") from error


def file_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        OSError: It cannot be read.
        ValueError: There is none, or it is not UTF-8.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_file {path} is not UTF-8 text: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"--prompt_file {path} has no text: write one prompt in each line")
    return prompts


def task_prompts(
    names: str, *, limit: int, split: str | None = None, data_dir: str | None = None, scoring: str | None = None
) -> list[str]:
    """The prompts of the first rows of tasks, as they are put to the model when it is evaluated.

    Args:
        names: Tasks with commas between them.
        limit: Rows of all tasks together, the same number of each.
        split: None: the reported one.
        data_dir, scoring: As in `load_task`.

    Raises:
        DataError: A task is not known, or its rows cannot be read.
    """
    tasks = tasks_of(names)
    each = max(limit // len(tasks), 1)
    return [
        question.prompt
        for task in tasks
        for question in load_task(task, split or task.heldout_split, data_dir=data_dir, scoring=scoring, limit=each)
    ]
