"""The experts' sum added to a frozen projection's output, without a tensor of its own.

Shape legend: T tokens, O out_features, e experts, r rank.

    y += scaling * sum_i p_i B_i h_i        h_i = A_i x

``(h * p)`` and then the stacked B are one product that accumulates in y. Neither the sum nor anything else of size O is
kept for backward: it needs h and p alone, since the gradient of y is that of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_ds.ops.autocast import without_autocast
from ldmole_ds.ops.matrix_products import products_for


def _weighted(h_XT: Tensor, p_eT: Tensor, scaling: float) -> Tensor:
    """``(e * r, T)``: each expert's r rows times its routing weight."""
    return (_by_expert(h_XT, p_eT) * (p_eT * scaling).unsqueeze(1)).view(h_XT.shape)


def _by_expert(h_XT: Tensor, p_eT: Tensor) -> Tensor:
    """``(e * r, T) -> (e, r, T)``; T may be 0."""
    e, t = p_eT.shape
    return h_XT.view(e, h_XT.shape[0] // e, t)


def add_product(y_TO: Tensor, h_XT: Tensor, p_eT: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Add the sum to y in place; no graph."""
    factors = _weighted(h_XT, p_eT, scaling).t(), lora_B.reshape(-1, y_TO.shape[1])
    products_for(y_TO).add_mm_(y_TO, *factors)


def product_gradients(
    grad_TO: Tensor, h_XT: Tensor, p_eT: Tensor, lora_B: Tensor, scaling: float, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of `add_product` for h, p and lora_B, as far as they are needed."""
    (need_h, need_p, need_B), products = needed, products_for(grad_TO)
    grad_h = grad_p = grad_B = None
    if need_B:
        grad_B = products.mm(_weighted(h_XT, p_eT, scaling), grad_TO).view_as(lora_B)
    if need_h or need_p:
        grad_hp = _by_expert(products.mm(lora_B.reshape(-1, grad_TO.shape[1]), grad_TO.t()), p_eT)
    if need_p:
        grad_p = (grad_hp * _by_expert(h_XT, p_eT)).sum(1).mul_(scaling)
    if need_h:
        grad_h = grad_hp.mul_((p_eT * scaling).unsqueeze(1)).view(h_XT.shape)
    return grad_h, grad_p, grad_B


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, h_XT, p_eT, lora_B, scaling, in_place):
        ctx.save_for_backward(h_XT, p_eT, lora_B)
        ctx.scaling = scaling
        with without_autocast(y):
            if in_place:
                ctx.mark_dirty(y)
            else:
                y = y.clone(memory_format=torch.contiguous_format)  # not a view: more may be added in place
            add_product(y.view(-1, y.shape[-1]), h_XT, p_eT, lora_B, scaling)
            return y

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        with without_autocast(grad):
            grad_TO = grad.view(-1, grad.shape[-1])
            grads = product_gradients(grad_TO, *ctx.saved_tensors, ctx.scaling, ctx.needs_input_grad[1:4])
        return grad, *grads, None, None


def add_update(y: Tensor, dtype: torch.dtype, in_place: bool, add: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """What ``add`` makes of y, in place or not; of a sum beside y where the experts' ``dtype`` is not that of y."""
    if y.dtype != dtype:  # adapters in float32 beside a half-precision base
        return y + add(torch.zeros(y.shape, dtype=dtype, device=y.device), True).to(y.dtype)
    # What autograd does about an in-place change of a view costs more than a new tensor.
    return add(y, in_place and y.is_contiguous() and not y._is_view())


@dataclass(frozen=True)
class LowRankUpdate:
    """The sum over a projection's experts, in factors.

    Attributes:
        h_XT: ``A x`` of all its experts, ``(e * r, T)``.
        p_eT: Routing weights, ``(e, T)``, in the dtype of h.
        lora_B: ``(e, r, O)``.
        scaling: ``lora_alpha / r``.
    """

    h_XT: Tensor
    p_eT: Tensor
    lora_B: Tensor
    scaling: float

    def add_to(self, y: Tensor, in_place: bool) -> Tensor:
        """``y (..., O)`` plus the sum. ``in_place``: y is overwritten; nothing else may need its old values."""

        def add(y: Tensor, in_place: bool) -> Tensor:
            return _AddLowRank.apply(y, self.h_XT, self.p_eT, self.lora_B, self.scaling, in_place)

        return add_update(y, self.h_XT.dtype, in_place, add)

    def add_to_reference(self, y: Tensor) -> Tensor:
        """The same with every expert's output written out, differentiated by autograd."""
        outputs_eTO = torch.einsum("ert,ero->eto", _by_expert(self.h_XT, self.p_eT), self.lora_B)
        total = self.scaling * torch.einsum("et,eto->to", self.p_eT, outputs_eTO)
        return y + total.view(y.shape).to(y.dtype)
