"""Merging an adapter into its base, where that is exact: one expert whose weight is 1 for every token.

    W x + (alpha / r) B A x  =  (W + (alpha / r) B A) x

In a mixture the update is a sum over experts weighted by ``p(x)``: another matrix for every token, so no single one
can replace it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ldmole_ds.distributed.zero import is_zero3_parameter
from ldmole_ds.layers import AdaptedLinear
from ldmole_ds.model.quantized import has_quantized_layers

if TYPE_CHECKING:
    from ldmole_ds.model.ldmole_model import LDMoLEModel


@torch.no_grad()
def merge_and_unload(model: LDMoLEModel) -> nn.Module:
    """See `LDMoLEModel.merge_and_unload`."""
    _check_mergeable(model)
    base = model.base_model
    layers = {name: m for name, m in base.named_modules() if isinstance(m, AdaptedLinear)}
    merged = {name: _merged_weight(name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.base_layer.weight = nn.Parameter(merged[name], requires_grad=False)
        base.set_submodule(name, layer.base_layer)
    model.release_base()
    return base


def _check_mergeable(model: LDMoLEModel) -> None:
    config = model.adapter_config
    if config.router != "lora":
        raise ValueError(
            f"an adapter with router {config.router} cannot be merged: its routing weights depend on the token, so no "
            "one weight matrix gives its outputs; serve it with LDMoLEModel.from_pretrained (router lora can be merged)"
        )
    if has_quantized_layers(model.base_model):
        raise ValueError(
            "the base model is quantised, and rounding the merged weights again would change the outputs: load it "
            "without quantization, LDMoLEModel.from_pretrained(base, adapter), and merge that"
        )
    if any(map(is_zero3_parameter, model.parameters())):
        raise ValueError(
            "the model is partitioned by ZeRO-3: save_pretrained it, load it in one process with "
            "LDMoLEModel.from_pretrained, and merge that"
        )


def _merged_weight(name: str, layer: AdaptedLinear) -> torch.Tensor:
    """``W + scaling B A`` in the layout and dtype of W, summed in float32."""
    group, weight = layer.group, layer.base_layer.weight
    lora_A, lora_B = group.lora_A[layer.member, 0].float(), group.lora_B[layer.member][0].float()  # (r, D), (r, O)
    update = group.scaling * (lora_B.t() @ lora_A)
    merged = (weight.float() + (update.t() if isinstance(layer.base_layer, Conv1D) else update)).to(weight.dtype)
    if not merged.isfinite().all():
        raise ValueError(f"{name}: the merged weight overflows {weight.dtype}: load the base in bfloat16 or float32")
    return merged
