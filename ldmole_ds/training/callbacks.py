"""Small callbacks of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ldmole_ds.training.run_record import write_json
from ldmole_ds.training.runtime import limit_group_timeouts


class GroupTimeoutCallback(TrainerCallback):
    """Gives every process group, DeepSpeed's included, the timeout of ``--ddp_timeout`` once they all exist."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        limit_group_timeouts(args.ddp_timeout)


class SettingsFileCallback(TrainerCallback):
    """Writes the run's settings once training begins: a resume that is refused leaves those of the run as they were."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            write_json(self.path, self.settings)
