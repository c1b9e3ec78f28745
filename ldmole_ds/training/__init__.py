"""Training with the Hugging Face Trainer under DeepSpeed."""

from ldmole_ds.training.trainer import LDMoLETrainer

__all__ = ["LDMoLETrainer"]
