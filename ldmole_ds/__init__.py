"""Expert-parallel mixtures of LoRA experts with learned dynamic routing, for DeepSpeed and Hugging Face models.

The public API. `LDMoLETrainer` is imported on first use: everything else works without the training stack.
"""

from __future__ import annotations

from typing import Any

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import LDMoLEModel, get_ldmole_model, ldmole_param_groups
from ldmole_ds.ops import sparsegen

__version__ = "0.1.0"
__all__ = [
    "LDMoLEConfig",
    "LDMoLEModel",
    "LDMoLETrainer",
    "get_ldmole_model",
    "ldmole_param_groups",
    "sparsegen",
]


def __getattr__(name: str) -> Any:
    if name == "LDMoLETrainer":
        from ldmole_ds.training import LDMoLETrainer

        return LDMoLETrainer
    raise AttributeError(f"module 'ldmole_ds' has no attribute {name!r}")
