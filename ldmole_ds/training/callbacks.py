"""Small callbacks of a training run."""

from __future__ import annotations

from transformers import TrainerCallback

from ldmole_ds.training.runtime import limit_group_timeouts


class GroupTimeoutCallback(TrainerCallback):
    """Gives every process group, DeepSpeed's included, the timeout of ``--ddp_timeout`` once they all exist."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        limit_group_timeouts(args.ddp_timeout)
