"""Optimizer groups for a training loop of one's own."""

from __future__ import annotations

from torch import nn

from ldmole_ds.distributed import deepspeed_groups
from ldmole_ds.model.ldmole_model import LDMoLEModel


def ldmole_param_groups(model: LDMoLEModel, weight_decay: float = 0.0) -> list[dict]:
    """Trainable parameters as optimizer groups: biases without weight decay, experts split off for DeepSpeed.

    Args:
        model: The wrapped model.
        weight_decay: For everything but biases.
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (rest if "bias" in name.rsplit(".", 1)[-1] else decay).append(param)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
    ]
    if any(deepspeed_groups.is_expert_parameter(p) for p in decay):
        return deepspeed_groups.split_expert_param_groups(groups)
    return [group for group in groups if group["params"]]
