"""The batch in a checkpoint: a run that goes on with another one would go on at other rows.

The position in the data is counted in optimizer steps. While the batch grows, their rows follow from the warm-up and
from the full batch, so a checkpoint notes both, and a run that has others is refused before anything is loaded.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import TrainingArguments

from ldmole_ds.checkpoint import CheckpointError
from ldmole_ds.distributed.agreement import raise_together
from ldmole_ds.training.batch import BatchSizeWarmup

logger = logging.getLogger(__name__)
BATCH_NAME = "batch.json"


@dataclass(frozen=True)
class BatchRecord:
    """What decides how many rows each optimizer step of a run takes, over all ranks.

    Attributes:
        full: Rows of a step, once the batch has grown.
        warmup: How it grows, None if it does not.
    """

    full: int
    warmup: BatchSizeWarmup | None = None

    @classmethod
    def of(cls, args: TrainingArguments, warmup: BatchSizeWarmup | None) -> BatchRecord:
        """Of a run with these arguments."""
        return cls(args.train_batch_size * args.gradient_accumulation_steps * args.world_size, warmup)

    @classmethod
    def read(cls, folder: Path) -> BatchRecord:
        """Of a checkpoint."""
        values = json.loads((folder / BATCH_NAME).read_text(encoding="utf-8"))
        warmup = values["warmup"]
        return cls(values["full"], BatchSizeWarmup(**warmup) if warmup else None)

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        (folder / BATCH_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        if self.warmup is None:
            return f"--global_batch_size {self.full} without batch-size warm-up"
        growth = f"--batch_size_warmup_start {self.warmup.start} --batch_size_warmup_steps {self.warmup.steps}"
        return f"--global_batch_size {self.full} {growth}"


def check_batch(folder: Path, now: BatchRecord, rank: int = 0) -> None:
    """Compare the batch of a checkpoint with that of the run that goes on from it. Collective.

    Without warm-up another batch may be wanted, and is only warned of.

    Args:
        folder: Of the checkpoint. One that notes no batch fits any.
        now: Of this run.
        rank: This rank; rank 0 warns.

    Raises:
        CheckpointError: On every rank, where they differ and either has a warm-up.
    """
    with raise_together(CheckpointError):
        saved = BatchRecord.read(folder) if (folder / BATCH_NAME).is_file() else now
        if saved != now and (saved.warmup or now.warmup):
            raise ValueError(
                f"{folder} was saved with {saved}, this run has {now}, and would go on at other rows: take the batch "
                f"it was saved with, or start a new run from its weights with --adapter_name_or_path {folder}"
            )
    if saved != now and rank == 0:
        logger.warning(
            "%s was saved with %d rows a step, this run has %d: it goes on at other rows, as the position in the data "
            "is counted in steps; for the same ones resume with --global_batch_size %d",
            folder,
            saved.full,
            now.full,
            saved.full,
        )
