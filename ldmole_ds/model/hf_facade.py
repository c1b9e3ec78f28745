"""What makes the wrapped model look like the Hugging Face model inside: its output, its mask, its signature."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


@functools.cache
def with_aux_losses(output_type: type[ModelOutput]) -> type[ModelOutput]:
    """The model's output class with one more item, ``aux_losses``: a registered pytree, as DDP and others need."""
    item = ("aux_losses", dict | None, dataclasses.field(default=None))
    return dataclasses.make_dataclass(f"{output_type.__name__}WithAuxLosses", [item], bases=(output_type,))


def padding_mask_of(attention_mask: Any) -> Tensor | None:
    """``(B, S)`` bool from a two-dimensional attention mask; None for other shapes, or no mask."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask != 0


def adopt_signature(model: nn.Module, base_model: nn.Module) -> None:
    """``inspect.signature(model.forward)`` is that of the base model: the Trainer reads it to keep columns."""

    @torch.compiler.disable(recursive=False)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    parameters = list(inspect.signature(base_model.forward).parameters.values())
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([self_parameter, *parameters])
    model.forward = types.MethodType(forward, model)
