"""The grouped experts' sum added to a frozen projection's output: `LowRankUpdate`'s twin for active pairs alone.

Shape legend: T tokens, D in_features, O out_features, e experts, r rank.

Expert by expert its tokens' rows are added to the output in place; see `ldmole_ds.ops.grouped_experts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_ds.ops.grouped_experts import add_experts, grouped_input_gradients, grouped_weight_gradients
from ldmole_ds.ops.lora_experts import lora_experts_reference
from ldmole_ds.ops.low_rank_update import LowRankUpdate, add_update


class _AddGrouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x_TD, w_T1e, lora_A, lora_B, scaling, in_place):
        if in_place:
            ctx.mark_dirty(y)
        else:
            y = y.clone(memory_format=torch.contiguous_format)
        with torch.autocast(y.device.type, enabled=False):
            pairs = add_experts([y.view(-1, y.shape[-1])], x_TD, w_T1e, lora_A, [lora_B], scaling)
        ctx.save_for_backward(x_TD, lora_A, lora_B, *pairs)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        x_TD, lora_A, lora_B, *pairs = ctx.saved_tensors
        _, need_x, _, need_A, need_B = ctx.needs_input_grad[:5]
        grad_A = grad_B = None
        grad_x = torch.empty_like(x_TD) if need_x else None
        with torch.autocast(grad.device.type, enabled=False):
            grad_TO, weights = grad.reshape(-1, grad.shape[-1]), (lora_A, [lora_B], ctx.scaling)
            grad_w, grad_h = grouped_input_gradients(grad_TO, pairs, *weights, grad_x)
            if need_A or need_B:
                grad_A, (grad_B,) = grouped_weight_gradients(grad_TO, x_TD, pairs, grad_h, *weights)
        return grad, grad_x, grad_w, grad_A, grad_B, None, None


@dataclass(frozen=True)
class GroupedUpdate:
    """The sum over a projection's active experts, not computed yet.

    Attributes:
        x_TD: Tokens.
        w_T1e: Routing weights, ``(T, 1, e)``, in the dtype of x.
        lora_A: ``(1, e, r, D)``.
        lora_B: ``(e, r, O)``.
        scaling: ``lora_alpha / r``.
    """

    x_TD: Tensor
    w_T1e: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def add_to(self, y: Tensor, in_place: bool) -> Tensor:
        """``y (..., O)`` plus the sum. ``in_place``: y is overwritten; nothing else may need its old values."""

        def add(y: Tensor, in_place: bool) -> Tensor:
            return _AddGrouped.apply(y, self.x_TD, self.w_T1e, self.lora_A, self.lora_B, self.scaling, in_place)

        return add_update(y, self.x_TD.dtype, in_place, add)

    def add_to_reference(self, y: Tensor) -> Tensor:
        """The same with every expert's output written out, differentiated by autograd."""
        total = lora_experts_reference(self.x_TD, self.w_T1e, self.lora_A, [self.lora_B], self.scaling)
        return y + total.view(y.shape).to(y.dtype)


# What a projection's frozen layer adds to its output.
Update = LowRankUpdate | GroupedUpdate
