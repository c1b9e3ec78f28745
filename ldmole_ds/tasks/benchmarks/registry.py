"""The tasks by name: where the rows are, how one is read, which splits count, what is measured."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ldmole_ds.tasks.benchmarks.choices import choice_item
from ldmole_ds.tasks.benchmarks.endings import hellaswag_item, swag_item
from ldmole_ds.tasks.benchmarks.glue import cola_item, rte_item
from ldmole_ds.tasks.benchmarks.mmlu_pro import carve, mmlu_pro_item
from ldmole_ds.tasks.benchmarks.topics import topic_item
from ldmole_ds.tasks.item import Item
from ldmole_ds.tasks.rows import DataError, Row


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: As in ``--task``.
        hub: Hub dataset and its configuration, None for embedded rows.
        read: From a row to an item.
        heldout_split: The split that results are reported on: test, or validation where answers of the test split are
            not published.
        train_split: The split to train on.
        scoring: How it is scored unless something else is asked for.
        label_smoothing: In training, unless something else is asked for.
        metric: Beside accuracy; a name in `ldmole_ds.tasks.metrics`.
        carve: Makes a split out of the hub dataset's test split, where it has no others.
    """

    name: str
    hub: tuple[str, str | None] | None
    read: Callable[[Row], Item]
    heldout_split: str = "validation"
    train_split: str = "train"
    scoring: str = "letters"
    label_smoothing: float = 0.1
    metric: str | None = None
    carve: Callable | None = None


TASKS = {
    task.name: task
    for task in (
        Task("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), choice_item, heldout_split="test"),
        Task("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), choice_item, heldout_split="test"),
        Task("openbookqa", ("allenai/openbookqa", "main"), choice_item, heldout_split="test"),
        Task("commonsense_qa", ("tau/commonsense_qa", None), choice_item),
        Task("swag", ("allenai/swag", "regular"), swag_item),
        Task("hellaswag", ("Rowan/hellaswag", None), hellaswag_item),
        Task("mmlu_pro", ("TIGER-Lab/MMLU-Pro", None), mmlu_pro_item, heldout_split="test", carve=carve),
        Task("cola", ("nyu-mll/glue", "cola"), cola_item, label_smoothing=0.0, metric="matthews_correlation"),
        Task("rte", ("nyu-mll/glue", "rte"), rte_item, label_smoothing=0.0),
        Task("clinc_domains", None, topic_item, heldout_split="test", scoring="cloze", label_smoothing=0.0),
    )
}


def tasks_of(names: str) -> list[Task]:
    """The tasks of a comma-separated list, in its order.

    Raises:
        DataError: A name is not known, or occurs twice.
    """
    found = []
    for name in (part.strip() for part in names.split(",")):
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise DataError(f"--task {name!r} is not known: {hint}choose among {', '.join(TASKS)}")
        if TASKS[name] in found:
            raise DataError(f"--task names {name} twice: name each task once, and weigh them with --mixture")
        found.append(TASKS[name])
    return found
