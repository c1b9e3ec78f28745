"""Sparsegen, the auxiliary losses, the expert products, in torch, C and Triton. Nothing knows a process group."""

from ldmole_ds.ops.lora_experts import lora_experts, lora_experts_reference
from ldmole_ds.ops.losses import load_balancing_loss, lower_lambda, router_z_loss, sparsity_loss
from ldmole_ds.ops.sparsegen import sparsegen, sparsegen_reference

__all__ = [
    "load_balancing_loss",
    "lora_experts",
    "lora_experts_reference",
    "lower_lambda",
    "router_z_loss",
    "sparsegen",
    "sparsegen_reference",
    "sparsity_loss",
]
