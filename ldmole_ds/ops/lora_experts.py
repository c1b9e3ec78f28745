"""The experts' products for all projections of one input group.

Shape legend: N tokens at the experts, D in_features, G projections, e local experts, r rank, O_g out_features of
projection g, O their sum.

    y_g = scaling * sum_i w_gi B_gi A_gi x

Per token the experts of a projection differ in rank space only, so the sum over experts is two plain products over
the stacked experts, ``((x A^T) * w) B``: no (N, e, O) tensor, no permutation of tokens by expert. Inactive experts
carry weight 0 and contribute exact zeros. `ldmole_ds.ops.grouped_experts` leaves them out instead;
`ldmole_ds.ops.expert_compute` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Products(NamedTuple):
    """A way to compute the experts' products, in three steps without a graph, for dispatchers to send in between.

    Attributes:
        forward: As `experts_forward`: the result, and the tensors that backward needs besides x and the experts.
        input_gradients: As `experts_input_gradients`.
        weight_gradients: As `experts_weight_gradients`.
    """

    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    input_gradients: Callable[..., tuple[Tensor, Tensor]]
    weight_gradients: Callable[..., tuple[Tensor, list[Tensor]]]


def experts_forward(
    x_ND: Tensor, w_NGe: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], scaling: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The module docstring's formula: ``(N, D), (N, G, e) -> y (N, O)``, and kept w and ``h = x A^T (N, G, e, r)``."""
    num_groups, e, r, d = lora_A.shape
    n = x_ND.shape[0]
    h = (x_ND @ lora_A.reshape(-1, d).t()).view(n, num_groups, e, r)
    hw = (h * (w_NGe * scaling).unsqueeze(-1)).view(n, num_groups, e * r)
    out_sizes = [b.shape[-1] for b in lora_B]
    y = x_ND.new_empty(n, sum(out_sizes))
    for g, (y_g, b) in enumerate(zip(y.split(out_sizes, dim=1), lora_B, strict=True)):
        torch.mm(hw[:, g], b.reshape(e * r, -1), out=y_g)
    return y, (w_NGe, h)


def experts_input_gradients(
    grad_y: Tensor,
    kept: tuple[Tensor, Tensor],
    lora_A: Tensor,
    lora_B: Sequence[Tensor],
    scaling: float,
    out_x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `experts_forward` that earlier layers wait for: of the weights, and of h as ``(N, G * e * r)``.

    Args:
        grad_y, kept, lora_A, lora_B, scaling: As there.
        out_x: ``(N, D)``, rows may lie apart: the gradient of x is written here.
    """
    (w_NGe, h), (num_groups, e, r, d) = kept, lora_A.shape
    n = grad_y.shape[0]
    grad_hw = torch.empty_like(h)
    grads = grad_y.split([b.shape[-1] for b in lora_B], dim=1)
    for g, (dy, b) in enumerate(zip(grads, lora_B, strict=True)):
        torch.mm(dy, b.reshape(e * r, -1).t(), out=grad_hw.view(n, num_groups, e * r)[:, g])
    grad_w = (grad_hw * h).sum(-1).mul_(scaling)
    grad_h = grad_hw.mul_((w_NGe * scaling).unsqueeze(-1)).view(n, num_groups * e * r)
    if out_x is not None:
        torch.mm(grad_h, lora_A.reshape(-1, d), out=out_x)
    return grad_w, grad_h


def experts_weight_gradients(
    grad_y: Tensor,
    x_ND: Tensor,
    kept: tuple[Tensor, Tensor],
    grad_h: Tensor,
    lora_A: Tensor,
    lora_B: Sequence[Tensor],
    scaling: float,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``lora_A`` and of each ``lora_B``; ``grad_h`` is what `experts_input_gradients` found."""
    (w_NGe, h), (num_groups, e, r, _) = kept, lora_A.shape
    hw = (h * (w_NGe * scaling).unsqueeze(-1)).view(-1, num_groups, e * r)
    grads = grad_y.split([b.shape[-1] for b in lora_B], dim=1)
    grad_B = [(hw[:, g].t() @ dy).view_as(b) for g, (dy, b) in enumerate(zip(grads, lora_B, strict=True))]
    return (grad_h.t() @ x_ND).view_as(lora_A), grad_B


DENSE = Products(experts_forward, experts_input_gradients, experts_weight_gradients)


class _LoRAExperts(torch.autograd.Function):
    """Keeps x and what the products keep (dense: h and w), and nothing of size O."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, w_NGe: Tensor, scaling: float, products: Products, lora_A: Tensor, *lora_B: Tensor):
        y, kept = products.forward(x_ND, w_NGe, lora_A, lora_B, scaling)
        ctx.save_for_backward(x_ND, lora_A, *lora_B, *kept)
        ctx.scaling, ctx.products, ctx.num_groups = scaling, products, len(lora_B)
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, lora_A, *rest = ctx.saved_tensors
        lora_B, kept = rest[: ctx.num_groups], rest[ctx.num_groups :]
        need_x, _, _, _, *need_weights = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if need_x else None
        grad_w, grad_h = ctx.products.input_gradients(grad_y, kept, lora_A, lora_B, ctx.scaling, grad_x)
        if not any(need_weights):
            return grad_x, grad_w, None, None, *[None] * len(need_weights)
        grad_A, grad_B = ctx.products.weight_gradients(grad_y, x, kept, grad_h, lora_A, lora_B, ctx.scaling)
        return grad_x, grad_w, None, None, grad_A, *grad_B


def lora_experts(
    x_ND: Tensor,
    w_NGe: Tensor,
    lora_A: Tensor,
    lora_B: Sequence[Tensor],
    scaling: float,
    products: Products = DENSE,
) -> Tensor:
    """Sum of the local experts of every projection of an input group.

    Args:
        x_ND: Tokens, ``(N, D)``; N may be 0.
        w_NGe: Routing weights of the local experts, ``(N, G, e)``, dtype of ``x_ND``.
        lora_A: ``(G, e, r, D)``.
        lora_B: G tensors ``(e, r, O_g)``.
        scaling: ``lora_alpha / r``.
        products: How they are computed; ``torch.compile`` traces the dense ones.

    Returns:
        ``(N, O)``: the projections' results side by side.
    """
    if torch.compiler.is_compiling():
        return _traceable(x_ND, w_NGe, lora_A, lora_B, scaling)
    return _LoRAExperts.apply(x_ND, w_NGe, scaling, products, lora_A, *lora_B)


def _traceable(x_ND: Tensor, w_NGe: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], scaling: float) -> Tensor:
    """The same in plain operations: ``torch.compile`` cannot trace products written into views, and needs none."""
    num_groups, e, r, d = lora_A.shape
    h = (x_ND @ lora_A.reshape(-1, d).t()).view(x_ND.shape[0], num_groups, e, r)
    hw = (h * (w_NGe * scaling).unsqueeze(-1)).flatten(2)
    return torch.cat([hw[:, g] @ b.reshape(e * r, -1) for g, b in enumerate(lora_B)], dim=1)


def lora_experts_reference(
    x_ND: Tensor, w_NGe: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], scaling: float
) -> Tensor:
    """The same sum with every expert's output written out as ``(N, e, O_g)``: slow, obvious, the tests' oracle."""
    outputs = []
    for g, b in enumerate(lora_B):
        h = torch.einsum("nd,erd->ner", x_ND, lora_A[g])
        per_expert = torch.einsum("ner,ero->neo", h, b)
        outputs.append(scaling * (w_NGe[:, g].unsqueeze(-1) * per_expert).sum(1))
    return torch.cat(outputs, dim=1)
