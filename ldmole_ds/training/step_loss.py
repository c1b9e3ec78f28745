"""The loss of a micro-batch, as its share of the loss of the whole optimizer step on all ranks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import find_labels

from ldmole_ds.model import LDMoLEModel

_CHOICE_FIELDS = ("candidate_ids", "candidate_lengths", "gold", "prompt_length")


class StepLossMixin:
    """Overrides of the Trainer for the loss. It has the step's ``_num_routed_tokens`` and a ``log_window``."""

    def __init__(self, model: LDMoLEModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        # The Trainer looks at our class, which names no labels, and takes every forward with **kwargs for one that
        # hands num_items_in_batch to its loss. Losses other than the causal one are means over their micro-batch.
        if self.args.label_names is None:
            self.label_names = find_labels(type(model.base_model))
        # The Trainer's own name: it counts shifted labels by it. It goes by loss_type, which GPT-2 has none of.
        self._loss_shifts_labels = getattr(model, "loss_function", None) is ForCausalLMLoss
        if not hasattr(model, "accepts_loss_kwargs"):
            self.model_accepts_loss_kwargs &= self._loss_shifts_labels

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy (smoothed if asked for) plus auxiliary losses, as this rank's share of the global mean."""
        inputs = {k: v for k, v in inputs.items() if k not in _CHOICE_FIELDS}
        if not return_outputs:  # metrics want all logits
            inputs = keep_answer_logits(inputs, self._forward_parameters)
        inputs = self._accepted(inputs)
        # A model that takes num_items_in_batch returns its share of the whole optimizer step; one that does not,
        # the mean of its micro-batch, which the Trainer averages.
        num_items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        if num_items is not None:
            inputs["num_items_in_batch"] = num_items
            if model.training:
                inputs["num_routed_tokens"] = self._num_routed_tokens
                inputs["gradient_accumulation_steps"] = self.current_gradient_accumulation_steps
        outputs = model(**inputs)
        loss = outputs["loss"]
        if self.args.label_smoothing_factor and model.training:
            loss = loss + self._smoothing(outputs["logits"], inputs["labels"], num_items)
        if num_items is not None:
            loss = loss * self.accelerator.num_processes
        if model.training:
            self._note_losses(outputs, num_items)
        return (loss, outputs) if return_outputs else loss

    def _smoothing(self, logits: Tensor, labels: Tensor, num_items: Tensor | None) -> Tensor:
        """What label smoothing adds to the cross-entropy: ``epsilon (mean_v -log p_v - (-log p_label))``."""
        if self._loss_shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        valid = labels.ne(-100)
        log_probs = F.log_softmax(logits[valid].float(), dim=-1)
        nll = -log_probs.gather(-1, labels[valid].unsqueeze(-1)).sum()
        uniform = -log_probs.mean(-1).sum()
        count = valid.sum() if num_items is None else num_items
        return self.args.label_smoothing_factor * (uniform - nll) / count

    @property
    def _forward_parameters(self) -> set[str]:
        # Not of our model: other trainers put forwards of their own in front of it.
        return set(inspect.signature(self.model.base_model.forward).parameters)

    def _accepted(self, inputs: dict) -> dict:
        if "position_ids" in inputs and "position_ids" not in self._forward_parameters:
            inputs.pop("position_ids")
        return inputs

    def _note_losses(self, outputs, num_items: Tensor | None) -> None:
        # Each value becomes this rank's share of the step's: a share of the global sum, or of the micro-steps' mean.
        accumulation = self.current_gradient_accumulation_steps
        scale = self.accelerator.num_processes if num_items is not None else 1 / accumulation
        aux = outputs["aux_losses"]
        with torch.no_grad():
            cross_entropy = outputs["loss"] - self.model.weighted(aux)
            for name, value in {"cross_entropy": cross_entropy, **aux}.items():
                self.log_window.add_loss(name, value * scale)


def keep_answer_logits(inputs: dict, parameters: set[str]) -> dict:
    """Compute logits only from the first answer token on: exact, and most of the head's cost when prompts are long."""
    labels = inputs.get("labels")
    if labels is None or "logits_to_keep" not in parameters or labels.dim() != 2:
        return inputs
    columns = labels.ne(-100).any(0).nonzero()
    if columns.numel() == 0 or labels.shape[1] < 2:
        return inputs
    keep = labels.shape[1] - max(int(columns[0]), 1) + 1
    return {**inputs, "labels": labels[:, -keep:], "logits_to_keep": keep}
