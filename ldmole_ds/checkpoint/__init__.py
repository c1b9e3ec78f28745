"""Training checkpoints: canonical form, sharded files, manifests. Needs torch and safetensors alone."""

from ldmole_ds.checkpoint.canonical import Span, overlaps
from ldmole_ds.checkpoint.folder import (
    CheckpointError,
    list_checkpoints,
    problem_of,
    recover,
    save_folder,
)
from ldmole_ds.checkpoint.state_reader import TrainingState, has_training_state
from ldmole_ds.checkpoint.state_writer import STATE_FOLDER, write_index, write_shard

__all__ = [
    "STATE_FOLDER",
    "CheckpointError",
    "Span",
    "TrainingState",
    "list_checkpoints",
    "has_training_state",
    "overlaps",
    "problem_of",
    "recover",
    "save_folder",
    "write_index",
    "write_shard",
]
