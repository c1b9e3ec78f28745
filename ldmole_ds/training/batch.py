"""Large batches: accumulation from the global batch size, and the learning rate that goes with it."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field

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
