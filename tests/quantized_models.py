"""The tiny Llama quantised by bitsandbytes, and the same base as plain linear layers: the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from ldmole_ds.layers import AdaptedLinear
from ldmole_ds.model.quantized import is_quantized
from tests.tiny import tiny_llama

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")


def quantized_layer(linear: nn.Linear, kind: str, compute_dtype: torch.dtype = torch.float32) -> nn.Module:
    """``linear`` as ``nf4`` (with QLoRA's double quantisation), ``fp4`` or ``int8``."""
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=compute_dtype, quant_type=kind)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def quantized_llama(kind: str, compute_dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """`tiny_llama` with every linear layer but the head quantised."""
    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantized_layer(module, kind, compute_dtype))
    return model


@torch.no_grad()
def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """``(O, D)`` float32: what the quantised weight stands for."""
    if hasattr(layer, "quant_state"):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * (scale.float() / 127).unsqueeze(1)


def dequantized_llama(kind: str) -> LlamaForCausalLM:
    """`quantized_llama` as plain linear layers with the same weights."""
    model = quantized_llama(kind)
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data.copy_(dequantized_weight(module))
            if module.bias is not None:
                linear.bias.data.copy_(module.bias.data)
            model.set_submodule(name, linear)
    return model


def call_all_frozen_layers(model) -> None:
    """Plain layers are called too, as quantised ones are: handing their input on rounds gradients less often."""
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            layer.base_layer.register_forward_hook(lambda *_: None)
