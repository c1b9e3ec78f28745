"""Whether a model keeps the documents of a packed row apart: seen by changing one and looking at the other."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ldmole_ds.tasks.sft.collate import PackedCollator
from ldmole_ds.tasks.sft.encode import Document
from ldmole_ds.training.runtime import UserError

_LENGTH = 8


class PackingCheckCallback(TrainerCallback):
    """Refuses to train before the first step, once the model is on its device and in its engine."""

    def __init__(self, collator: PackedCollator) -> None:
        self.collator = collator

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs) -> None:
        # The whole model: under ZeRO-3 its call is what gathers parameters.
        change = largest_change(model, self.collator)
        if change is not None:
            config = model.base_model.config
            raise UserError(
                f"--packing: {type(model.base_model).__name__} with {config._attn_implementation} attention lets a "
                f"document see the one before it in its row (logits change by {change:.1e}): leave out --packing, or "
                "choose another --attn_implementation"
            )


@torch.no_grad()
def largest_change(model: nn.Module, collator: PackedCollator) -> float | None:
    """How much logits of a document change with the one before it, relative to their size. Collective under ZeRO-3.

    Returns:
        None where they change by rounding only.
    """
    device, training = next(model.parameters()).device, model.training
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return float("inf")
    vocabulary = model.config.get_text_config().vocab_size
    model.eval()
    second = _document(range(_LENGTH, 2 * _LENGTH), vocabulary)
    logits = []
    for first in (range(_LENGTH), range(2 * _LENGTH, 3 * _LENGTH)):
        batch = collator([[_document(first, vocabulary), second]])
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        inputs.pop("labels"), inputs.pop("padding_mask")
        logits.append(model(**inputs)["logits"][:, _LENGTH:])
    model.train(training)
    eps = torch.finfo(logits[0].dtype).eps
    change = float((logits[0] - logits[1]).float().norm() / logits[0].float().norm())
    return change if change > max(1e-5, 4 * eps) else None


def _document(tokens: range, vocabulary: int) -> Document:
    return Document(tuple((7 * token + 3) % vocabulary for token in tokens), ((1, _LENGTH),))
