"""From arguments to cells: what is trained, on which rows, how a learning rate is chosen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmole_ds.compare.cell import Cell
from ldmole_ds.compare.methods import BASELINE, Method
from ldmole_ds.compare.statistics import Signal, signal
from ldmole_ds.tasks import Task
from ldmole_ds.training.run_record import ANSWERS_NAME

ROOT = Path(__file__).resolve().parents[2]
TEST_NAME = "test.json"
# What every run gets, unless the command line says otherwise.
RUN_DEFAULTS = {"logging_steps": 5, "save_strategy": "no", "eval_on_start": False, "report_to": "none"}


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        tasks: To compare on.
        methods: Plain LoRA first.
        seeds: Of the adapter's start and the order of rows; the first also chooses learning rates.
        learning_rates: One, or several of which each method takes its best.
        flags: For launch/train.py, of all runs alike.
        folder: Of all runs.
        launcher: What starts a run: a python, or a launcher with its flags; ``{port}`` is a free one.
        selection_rows: At most so many rows choose learning rates.
        test_rows: At most so many test rows; None: all.
        sweep: The setting that the methods vary, if it is a sweep.
    """

    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    flags: dict[str, Any]
    folder: Path
    launcher: tuple[str, ...] = (sys.executable,)
    selection_rows: int = 300
    test_rows: int | None = None
    sweep: str | None = None

    @property
    def selects(self) -> bool:
        """Whether there is a choice of learning rates."""
        return len(self.learning_rates) > 1

    def splits(self, task: Task) -> tuple[str, str]:
        """Rows to train on, and rows that choose a learning rate: never those that are reported."""
        train = self.flags.get("train_split") or task.train_split
        if task.heldout_split != "validation" and "validation_split" not in self.flags:
            return train, "validation"
        # The reported rows are validation rows: the last training rows choose, and nobody trains on them.
        return f"{train}[:-{self.selection_rows}]", f"{train}[-{self.selection_rows}:]"

    def train(self, task: Task, method: Method, rate: float, seed: int, *, select: bool) -> Cell:
        """Train, and measure on the rows that choose a rate or on the test rows."""
        train_split, selection_split = self.splits(task)
        rows = self.selection_rows if select else self.test_rows
        flags = {
            **RUN_DEFAULTS,
            **self.flags,
            **method.settings,
            "task": task.name,
            "train_split": train_split,
            "validation_split": selection_split if select else task.heldout_split,
            "learning_rate": rate,
            "seed": seed,
            **({"max_eval_samples": rows} if rows else {}),
        }
        folder = self.folder / task.name / method.name / f"{'select-' if select else ''}lr{rate:g}-seed{seed}"
        run = {"output_dir": str(folder), "resume": "auto", "disable_tqdm": True}
        return Cell(
            title=f"{task.name} {method.name} lr {rate:g} seed {seed}" + (" (choosing)" if select else ""),
            command=(*self.launcher, str(ROOT / "launch" / "train.py"), *as_argv({**flags, **run})),
            folder=folder,
            settings={"launcher": " ".join(self.launcher), **flags} if self.is_launched else flags,
            outputs={"report": "report.json", "answers": ANSWERS_NAME},
            record="cell.json",
        )

    def test(self, task: Task, method: Method, rate: float) -> Cell:
        """The first seed's adapter of a chosen rate on the test rows."""
        trained = self.train(task, method, rate, self.seeds[0], select=True)
        flags = {
            "task": task.name,
            "split": task.heldout_split,
            **({"limit": self.test_rows} if self.test_rows else {}),
        }
        shared = ("model_name_or_path", "data_dir", "scoring", "max_length", "dtype", "quantization", "revision",
                  "attn_implementation", "trust_remote_code")  # fmt: skip
        flags |= {name: self.flags[name] for name in shared if name in self.flags}
        run = {
            "adapter": str(trained.folder),
            "batch_size": self.flags.get("per_device_eval_batch_size", 16),
            "output_file": str(trained.folder / "evaluate.json"),
        }
        return Cell(
            title=f"{task.name} {method.name} lr {rate:g} seed {self.seeds[0]} (test rows)",
            command=(sys.executable, str(ROOT / "launch" / "evaluate.py"), *as_argv({**flags, **run})),
            folder=trained.folder,
            settings=flags,
            outputs={"evaluation": "evaluate.json"},
            record=TEST_NAME,
        )

    @property
    def is_launched(self) -> bool:
        """Whether a launcher starts the ranks of a run."""
        return self.launcher != (sys.executable,)

    def selection(self, task: Task, method: Method) -> list[Cell]:
        """The cells that choose a method's rate; none where there is one rate."""
        rates = self.learning_rates if self.selects else ()
        return [self.train(task, method, rate, self.seeds[0], select=True) for rate in rates]

    def finals(self, task: Task, method: Method, rate: float) -> dict[int, tuple[Cell, Cell]]:
        """By seed: the cell that trains with the chosen rate, and the one that has its answers to the test rows."""
        cells = {}
        for seed in self.seeds:
            if self.selects and seed == self.seeds[0]:
                cells[seed] = (self.train(task, method, rate, seed, select=True), self.test(task, method, rate))
            else:
                cells[seed] = (self.train(task, method, rate, seed, select=False),) * 2
        return cells

    def cells_of(self, task: Task, method: Method) -> int:
        """How many cells a method takes on a task."""
        return len(self.learning_rates) * self.selects + len(self.seeds)

    def possible_cells(self) -> Iterator[Cell]:
        """Every cell that may have to run, whatever rates are chosen."""
        for task in self.tasks:
            for method in self.methods:
                yield from self.selection(task, method)
                for rate in self.learning_rates:
                    yield from (answers for _, answers in self.finals(task, method, rate).values())

    def check_finished(self) -> int:
        """How many cells are done.

        Raises:
            ValueError: One was done with other settings.
        """
        return sum(cell.result() is not None for cell in self.possible_cells())


def chosen_rate(plan: Plan, task: Task, method: Method) -> tuple[float | None, dict[float, float]]:
    """The best rate on the rows that choose, of equals the lowest, and the accuracies; None until all have run."""
    if not plan.selects:
        return plan.learning_rates[0], {}
    results = [cell.result() for cell in plan.selection(task, method)]
    found = {
        rate: result["report"]["accuracy_after"]
        for rate, result in zip(plan.learning_rates, results, strict=True)
        if result is not None
    }
    if len(found) < len(plan.learning_rates):
        return None, found
    return max(sorted(found), key=found.get), found


def answers_of(result: dict[str, Any]) -> dict[str, Any]:
    """Answers to the test rows, the right ones and chance, of either kind of cell."""
    return result["answers"] if "answers" in result else result["evaluation"]["results"][0]


def task_signal(plan: Plan, task: Task) -> Signal | None:
    """Whether plain LoRA learns the task, by its first seed; None until that has run."""
    baseline = next(method for method in plan.methods if method.name == BASELINE)
    rate, _ = chosen_rate(plan, task, baseline)
    result = plan.finals(task, baseline, rate)[plan.seeds[0]][1].result() if rate is not None else None
    if result is None:
        return None
    found = answers_of(result)
    return signal(found["answers"], found["gold"], found["chance"])


def as_argv(flags: dict[str, Any]) -> tuple[str, ...]:
    """``--name value ...``, lists as several words."""
    argv: list[str] = []
    for name, value in flags.items():
        name = "lora_r" if name == "r" else name  # a launcher may take --r for a short form of a flag of its own
        argv += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return tuple(argv)
