"""Floating-point operations of training, and what a card can do: the two halves of model FLOPs utilisation (MFU).

Counted is what the mathematics needs, a multiplication and an addition as two operations:

    frozen weight       2 per token forward, 2 backward (the input's gradient; none of the weight)
    trained weight      2 per token forward, 4 backward
    attention           4 per pair of positions, layer and head width forward, 8 backward; causal pairs only
    head                as a weight, on the tokens that have a label
    LoRA expert         6 r (D + O) for each token that uses it; experts that a token does not use cost nothing
    router, lambda MLP  as trained weights

Recomputation under activation checkpointing is not counted, nor are zero-weighted experts that a kernel computes
anyway: an implementation that does less for the same result scores higher (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ldmole_ds.distributed.zero import full_shape
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.moe_base import expert_holders, is_inside
from ldmole_ds.model.quantized import num_weights

# Dense bf16 (T4, V100: fp16) tensor-core peaks of the vendors' data sheets, without sparsity. The first match counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A6000": 155.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.0,
}


def peak_tflops_of(device_name: str) -> float | None:
    """Peak of a card by the name that its driver gives, 10^12 operations a second; None if it is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def device_peak_tflops(device: torch.device) -> float | None:
    """Peak of this device; None for processors and cards that are not in the table."""
    return peak_tflops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class TrainingFlops:
    """Operations of training steps, forward and backward.

    Attributes:
        per_token: Of the base model but its head.
        per_answer: Of the head, for a token with a label.
        per_pair: Of attention, for a position and one that it attends to.
    """

    def __init__(self, model: LDMoLEModel) -> None:
        base = model.base_model
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        experts, share = expert_holders(base), _active_share(base)
        self.per_token, self.per_answer = 0.0, 0.0
        for name, module in base.named_modules():
            if isinstance(module, nn.Embedding):
                continue
            cost = sum(
                (6 if p.requires_grad else 4) * num_weights(p)
                for p in module.parameters(recurse=False)
                if len(full_shape(p)) > 1
            )
            if module is head:
                self.per_answer += cost
            else:
                self.per_token += cost * (share if is_inside(name, experts) else 1)
        self.per_pair = 12 * _attention_width(base)
        self._adapter = {
            member: (6 * group.r * (group.in_features + out), 6 * group.num_experts * group.in_features)
            for group in model.input_groups
            for member, out in zip(group.members, group.out_features, strict=True)
        }
        hidden = model.adapter_config.lambda_hidden_size
        self._lambda = {
            group.members[0]: 6 * hidden * (group.in_features + 1)
            for group in model.input_groups
            if group.lambda_mlp is not None
        }

    def of(self, tokens: int, answers: int, pairs: int, routing: dict[str, dict]) -> float:
        """Operations of one logging window over all ranks.

        Args:
            tokens: Not padding.
            answers: Those with a label.
            pairs: Positions that tokens attend to, summed over tokens.
            routing: `RoutingStatistics.totals` of the window.
        """
        total = self.per_token * tokens + self.per_answer * answers + self.per_pair * pairs
        for name, (per_use, per_token) in self._adapter.items():
            # A router without a gate (plain LoRA) records nothing: its one expert serves every token.
            row = routing.get(name)
            per_token = per_use if row is None else per_use * row["experts_per_token"] + per_token
            total += tokens * (per_token + self._lambda.get(name, 0))
        return total


def _text_config(base: nn.Module) -> Any:
    config = getattr(base, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _active_share(base: nn.Module) -> float:
    """Of the base's own experts, where it is a mixture of experts, the share that a token meets."""
    config = _text_config(base)
    active = getattr(config, "num_experts_per_tok", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return active / experts if active and experts else 1.0


def _attention_width(base: nn.Module) -> int:
    """Layers times heads times head width; 0 where the configuration does not say."""
    config = _text_config(base)
    layers, heads = (getattr(config, name, None) or 0 for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", None) or 0) // max(heads, 1)
    return layers * heads * width
