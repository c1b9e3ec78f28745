"""Values that no run can want, found while flags are parsed: before anything starts, and without a wrong run."""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace

from ldmole_ds.training.argument_groups import DataArguments, LayoutArguments, ModelArguments
from ldmole_ds.training.runtime import UserError

_AT_LEAST_1 = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "ddp_timeout",
)
_AT_LEAST_0 = ("learning_rate", "weight_decay", "num_train_epochs", "label_smoothing_factor")
# An empty one would be taken as not given, and silently bring the embedded model, no held-out rows, no DeepSpeed, ...
_NOT_EMPTY = {f.name for group in (ModelArguments, DataArguments, LayoutArguments) for f in dataclasses.fields(group)}
_NOT_EMPTY |= {"deepspeed", "output_dir", "resume_from_checkpoint"}


def check_flag_values(flags: Namespace) -> None:
    """Refuse them.

    Raises:
        UserError: Names the flag.
    """
    for name, value in vars(flags).items():
        if value == "" and name in _NOT_EMPTY:
            raise UserError(f"--{name} is empty: give a value, or leave it out (a shell variable may be unset)")
        if isinstance(value, float) and math.isnan(value) or name in _AT_LEAST_0 and math.isinf(value):
            raise UserError(f"--{name} must be a finite number, got {value}")
    for name in _AT_LEAST_1:
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} must be a whole number of at least 1, got {getattr(flags, name)}")
    for name in _AT_LEAST_0:
        if getattr(flags, name) < 0:
            raise UserError(f"--{name} must be 0 or more, got {getattr(flags, name)}")
    if flags.label_smoothing_factor >= 1:
        raise UserError(f"--label_smoothing_factor must be below 1, got {flags.label_smoothing_factor}")
