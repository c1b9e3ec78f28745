"""Tiny random models and ragged batches shared by the tests: those of the parity contract, under the tests' names."""

from ldmole_ds.parity.model import ragged_batch, wake_experts
from ldmole_ds.parity.model import small_config as tiny_config
from ldmole_ds.parity.model import small_llama as tiny_llama
from ldmole_ds.parity.model import small_model as tiny_model

__all__ = ["ragged_batch", "tiny_config", "tiny_llama", "tiny_model", "wake_experts"]
