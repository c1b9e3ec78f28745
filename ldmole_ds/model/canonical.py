"""Where each trainable parameter of a model lies in the canonical form of `ldmole_ds.checkpoint.canonical`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldmole_ds.checkpoint import Span, TrainingState
from ldmole_ds.distributed.zero import full_shape

if TYPE_CHECKING:
    from ldmole_ds.layers import InputGroup
    from ldmole_ds.model.ldmole_model import LDMoLEModel

L1_EXPONENT = "adaptive_l1.exponent"


def lambda_mlps(model: LDMoLEModel) -> dict[str, nn.Module]:
    """The lambda MLPs by input width (shared) or by input group (per layer)."""
    if model.lambda_mlps:
        return dict(model.lambda_mlps.items())
    return {g.name: g.lambda_mlp for g in model.input_groups if g.lambda_mlp is not None}


def saved_modules(model: LDMoLEModel) -> dict[str, nn.Parameter]:
    """Parameters of the base model that are trained in full, by name."""
    return {name: p for name, p in model.base_model.named_parameters() if p.requires_grad}


def canonical_spans(model: LDMoLEModel) -> dict[nn.Parameter, list[Span]]:
    """For every trainable parameter held here, its runs in the canonical form."""
    spans: dict[nn.Parameter, list[Span]] = {}
    for group in model.input_groups:
        first, held = group.topology.local_experts(group.num_experts).start, _local_experts(group)
        r, width = group.r, group.in_features
        size_A, size_gate = r * width, group.num_experts * width
        spans[group.lora_A] = [
            Span(f"{path}.lora_A", first * size_A, g * held * size_A, held * size_A)
            for g, path in enumerate(group.members)
        ]
        for path, param, out_features in zip(group.members, group.lora_B, group.out_features, strict=True):
            size_B = r * out_features
            spans[param] = [Span(f"{path}.lora_B", first * size_B, 0, held * size_B)]
        if group.gate is not None:
            spans[group.gate] = [
                Span(f"{path}.router", 0, g * size_gate, size_gate) for g, path in enumerate(group.members)
            ]
    for key, mlp in lambda_mlps(model).items():
        for name, param in mlp.named_parameters():
            spans[param] = [Span(f"lambda_mlp.{key}.{name}", 0, 0, full_shape(param).numel())]
    for name, param in saved_modules(model).items():
        spans[param] = [Span(name, 0, 0, full_shape(param).numel())]
    return spans


def canonical_shapes(model: LDMoLEModel) -> dict[str, tuple[int, ...]]:
    """Shape of every canonical tensor, all experts included; needs no weights and no collective."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group in model.input_groups:
        experts = group.num_experts
        for path, out_features in zip(group.members, group.out_features, strict=True):
            shapes[f"{path}.lora_A"] = (experts, group.r, group.in_features)
            shapes[f"{path}.lora_B"] = (experts, group.r, out_features)
            if group.gate is not None:
                shapes[f"{path}.router"] = (experts, group.in_features)
    for key, mlp in lambda_mlps(model).items():
        shapes.update({f"lambda_mlp.{key}.{name}": tuple(full_shape(p)) for name, p in mlp.named_parameters()})
    shapes.update({name: tuple(full_shape(p)) for name, p in saved_modules(model).items()})
    return shapes


def _local_experts(group: InputGroup) -> int:
    return len(group.topology.local_experts(group.num_experts))


def adapter_state(state: TrainingState) -> dict[str, Tensor]:
    """The adapter file's tensors, from a training checkpoint: weights alone, ``lora_B`` as (E, O, r)."""
    tensors = {}
    for key in state.shapes:
        value = state.read(key)
        tensors[key] = value.transpose(1, 2).contiguous() if key.endswith(".lora_B") else value
    if state.facts.get(L1_EXPONENT) is not None:
        tensors[L1_EXPONENT] = torch.tensor(state.facts[L1_EXPONENT])
    return tensors
