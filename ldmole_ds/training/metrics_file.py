"""``metrics.csv`` and ``metrics_per_layer.csv`` in the run's folder: one row a step, whatever stops and resumes."""

from __future__ import annotations

import csv
import io
import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ldmole_ds.model.adapter_io import write_atomically

logger = logging.getLogger(__name__)

METRICS_NAME, PER_LAYER_NAME = "metrics.csv", "metrics_per_layer.csv"
METRICS_COLUMNS = (
    "step", "epoch", "loss", "grad_norm", "learning_rate", "cross_entropy_loss", "sparsity_loss",
    "load_balancing_loss", "router_z_loss", "experts_per_token", "max_load", "max_rank_load", "dead_experts",
    "lambda_mean", "lambda_std", "dispatch_bytes_per_step", "tokens_per_second", "mfu", "eval_loss", "eval_accuracy",
    "eval_perplexity",
)  # fmt: skip
PER_LAYER_COLUMNS = (
    "step", "projection", "experts_per_token", "max_load", "dead_experts", "lambda_mean", "lambda_std"
)  # fmt: skip


class StepTable:
    """A CSV file whose rows come in blocks of one step; a block that comes again replaces itself.

    Args:
        path: Made when the first block is written.
        columns: Its columns, always the same; other values are dropped, missing ones left empty.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns
        self._step, self._block, self._begin = -1, [], 0

    def resume(self, step: int) -> None:
        """Keep what an earlier run wrote up to this step; nothing where the run begins."""
        rows: list[dict[str, Any]] = []
        if step and self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [
                    row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and int(row["step"]) <= step
                ]
        elif not self.path.exists():
            return
        text = self._lines([dict(zip(self.columns, self.columns, strict=True)), *rows])
        write_atomically(self.path, lambda path: path.write_bytes(text))

    def write(self, step: int, rows: list[dict[str, Any]], *, merge: bool = False) -> None:
        """Write a step's rows. With ``merge`` they complete those of the same step that were just written."""
        again = step == self._step
        if again and merge:
            rows = [{**old, **new} for old, new in zip(self._block, rows, strict=True)]
        new_file = not self.path.exists()
        begin = 0 if new_file else self._begin if again else self.path.stat().st_size
        head = self._lines([dict(zip(self.columns, self.columns, strict=True))]) if new_file else b""
        try:
            with open(self.path, "ab" if new_file else "r+b") as file:
                file.seek(begin)
                file.write(head + self._lines([{"step": step, **row} for row in rows]))
                file.truncate()
        except OSError:  # no half a row, to which the next would be added
            self.path.unlink(missing_ok=True) if new_file else os.truncate(self.path, begin)
            raise
        self._step, self._block, self._begin = step, rows, begin + len(head)

    def _lines(self, rows: list[dict[str, Any]]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


class MetricsFileCallback(TrainerCallback):
    """Writes every log to the run's folder, on rank 0: plain files beside what ``--report_to`` names.

    Args:
        trainer: Whose windows are written.
        per_layer: Also one row for each projection.
    """

    def __init__(self, trainer: Any, *, per_layer: bool = False) -> None:
        self.trainer = trainer
        folder = Path(trainer.args.output_dir)
        self.metrics = StepTable(folder / METRICS_NAME, METRICS_COLUMNS)
        self.per_layer = StepTable(folder / PER_LAYER_NAME, PER_LAYER_COLUMNS) if per_layer else None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            for table in filter(None, (self.metrics, self.per_layer)):
                table.resume(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        values = {name: value for name, value in (logs or {}).items() if name in METRICS_COLUMNS}
        if not state.is_world_process_zero or not values.keys() - {"step", "epoch"}:
            return
        try:
            self.metrics.write(state.global_step, [values], merge=True)
            if self.per_layer is not None and "loss" in values:
                rows = self.trainer.log_window.projections
                self.per_layer.write(state.global_step, [{"projection": name, **row} for name, row in rows.items()])
        except OSError as error:  # a full disk, which may have room again when the run saves
            logger.warning("%s lacks step %d: %s", self.metrics.path, state.global_step, error)
