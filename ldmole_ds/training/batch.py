"""Large batches: accumulation from the global batch size, its warm-up, and the learning rate that goes with it."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from itertools import groupby

LR_SCALING = ("none", "sqrt", "linear")


@dataclass
class BatchArguments:
    """How many rows an optimizer step takes, over all ranks."""

    _argument_group_name: typing.ClassVar[str] = "large batches"

    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of one optimizer step over all ranks; gradient_accumulation_steps follows from it and "
            "per_device_train_batch_size."
        },
    )
    lr_scaling: str = field(
        default="none",
        metadata={
            "help": "Scale learning_rate with the global batch size over base_batch_size: none, sqrt or linear.",
            "choices": LR_SCALING,
        },
    )
    base_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size for which learning_rate is right (with lr_scaling)."}
    )
    batch_size_warmup_start: int | None = field(
        default=None,
        metadata={
            "help": "Rows of the first optimizer step, over all ranks: early gradients point the same way in any few "
            "rows, so small steps at first save rows. The batch grows to global_batch_size in multiples of this size, "
            "as with Megatron's --rampup-batch-size; schedulers go on counting optimizer steps."
        },
    )
    batch_size_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps over which the batch grows (with batch_size_warmup_start). lr_scaling scales the "
            "rate for the full batch from the first step on: let it grow along with --warmup_steps."
        },
    )


@dataclass(frozen=True)
class BatchSizeWarmup:
    """A global batch that grows linearly over the first optimizer steps.

    Sizes are multiples of the first one, so that they are the same in every layout of ranks and micro-batches.

    Attributes:
        start: Rows of the first optimizer step over all ranks.
        steps: Optimizer steps before the first full batch.
    """

    start: int
    steps: int

    def rows(self, step: int, full: int) -> int:
        """Rows of an optimizer step (the first is 0) on the way to ``full`` rows."""
        if step >= self.steps:
            return full
        return (self.start + (full - self.start) * step // self.steps) // self.start * self.start

    def describe(self, full: int) -> str:
        """The schedule in a line: ``16, 32 x 2, 48 rows a step, 64 from step 5 on``."""
        runs = [(rows, len(list(group))) for rows, group in groupby(self.rows(s, full) for s in range(self.steps))]
        texts = [f"{rows} x {steps}" if steps > 1 else str(rows) for rows, steps in runs]
        if len(texts) > 8:
            texts[4:-2] = ["..."]
        return f"{', '.join(texts)} rows a step, {full} from step {self.steps + 1} on"

    def check(self, full: int, world_size: int) -> None:
        """Refuse what cannot be split over the ranks.

        Raises:
            ValueError: Names the flag and the remedy.
        """
        if self.steps < 1:
            raise ValueError(f"--batch_size_warmup_steps must be at least 1, got {self.steps}")
        if self.start < 1 or self.start % world_size:
            near = min(max(1, round(self.start / world_size)) * world_size, full)
            raise ValueError(
                f"--batch_size_warmup_start {self.start} is not a multiple of the {world_size} ranks, which take "
                f"equally many rows: use {near}"
            )
        if self.start >= full:
            raise ValueError(
                f"--batch_size_warmup_start {self.start} is not below the {full} rows of a full batch: lower it, or "
                "leave the warm-up out"
            )


def batch_size_warmup(arguments: BatchArguments) -> BatchSizeWarmup | None:
    """The warm-up that was asked for, if any.

    Raises:
        ValueError: One of its two flags is missing.
    """
    start, steps = arguments.batch_size_warmup_start, arguments.batch_size_warmup_steps
    if start is None and steps is None:
        return None
    if start is None or steps is None:
        given, missing = ("steps", "start") if start is None else ("start", "steps")
        raise ValueError(f"--batch_size_warmup_{given} needs --batch_size_warmup_{missing} too")
    return BatchSizeWarmup(start, steps)


def accumulation_steps(arguments: BatchArguments, micro: int, accumulation: int, world_size: int) -> int:
    """Micro-steps per optimizer step.

    Args:
        arguments: The flags.
        micro: Rows of one rank in one micro-step.
        accumulation: ``--gradient_accumulation_steps``, 1 if not given.
        world_size: Ranks.

    Raises:
        ValueError: The global batch is no multiple of ``micro * world_size``, or both flags are given and disagree.
    """
    size = arguments.global_batch_size
    if size is None:
        return accumulation
    one_pass = micro * world_size
    if size < 1 or size % one_pass:
        near = max(1, round(size / one_pass)) * one_pass
        raise ValueError(
            f"--global_batch_size {size} is not a multiple of {one_pass}, which is --per_device_train_batch_size "
            f"{micro} x {world_size} ranks: use {near}, or another --per_device_train_batch_size"
        )
    if accumulation not in (1, size // one_pass):
        raise ValueError(
            f"--global_batch_size {size} needs --gradient_accumulation_steps {size // one_pass}, got {accumulation}: "
            "give one of the two"
        )
    return size // one_pass


def scaled_learning_rate(arguments: BatchArguments, learning_rate: float, global_batch_size: int) -> float:
    """``learning_rate`` times (global / base batch size), or its square root.

    The rate belongs to the full batch, also while the batch warms up; it grows along with ``--warmup_steps``.

    Raises:
        ValueError: Scaling without a base batch size.
    """
    if arguments.lr_scaling == "none":
        return learning_rate
    base = arguments.base_batch_size
    if base is None or base < 1:
        raise ValueError(f"--lr_scaling {arguments.lr_scaling} needs --base_batch_size, for which the rate is right")
    ratio = global_batch_size / base
    return learning_rate * (math.sqrt(ratio) if arguments.lr_scaling == "sqrt" else ratio)
