"""Sparsegen: routing weights with a learned number of active experts.

For router logits ``u`` in R^E and a scalar ``lambda < 1`` Sparsegen (Laha et al. 2018, arXiv 1810.11975; used with a
learned lambda per token by LD-MoLE, arXiv 2509.25684, section 3) solves

    p = argmin over the simplex of  |p - u|^2 - lambda |p|^2

In closed form, with ``u`` sorted descending and ``U_k`` the sum of its k largest entries, the support S holds the k
largest entries, where k is the largest number with ``1 - lambda + k u_(k) > U_k``, and

    tau = (U_k - 1 + lambda) / k        p_i = max(u_i - tau, 0) / (1 - lambda)

lambda = 0 is sparsemax, lambda -> 1 leaves one expert, lambda -> -infinity gives every expert 1/E. On the support the
Jacobian is

    dp_i / du_j = (delta_ij - 1/k) / (1 - lambda)        dp_i / dlambda = (p_i - 1/k) / (1 - lambda)

and zero elsewhere, so the backward needs the support, ``p - 1/k`` and ``lambda``, and nothing that was sorted.

Numerics. The projection does not change when a constant is added to ``u``: the row's maximum is subtracted first, or
a common offset of 1e4 would cost all precision. Everything is float32 inside (float64 for float64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many experts the support is found by comparing all pairs, which beats a sort on every device we measured.
PAIRWISE_MAX_EXPERTS = 16


def _support_pairwise(z: Tensor, slack: Tensor, dim: int, out: Tensor) -> None:
    """Support by pairwise comparison: i is in it iff ``slack > sum_j max(z_j - z_i, 0)``; 1 and 0 to ``out``."""
    excess = (z.unsqueeze(dim) - z.unsqueeze(dim + 1)).clamp_(min=0).sum(dim + 1)
    torch.lt(excess, slack, out=out)


def _support_sorted(z: Tensor, slack: Tensor, dim: int, out: Tensor) -> None:
    """Support by one sort: the condition ``slack + k z_(k) > U_k`` holds for the k largest entries."""
    z_desc = z.sort(dim=dim, descending=True).values
    ranks = torch.arange(1, z.shape[dim] + 1, device=z.device, dtype=z.dtype)
    ranks = ranks.view([-1 if i == dim else 1 for i in range(z.dim())])
    k = (slack + ranks * z_desc > z_desc.cumsum(dim)).sum(dim, keepdim=True).clamp_(min=1)
    torch.ge(z, z_desc.gather(dim, k - 1), out=out)


class _Sparsegen(torch.autograd.Function):
    """``(logits (..., E, ...), lam) -> probs`` with the analytic backward of the module docstring.

    Support and all else are floats: on a CPU mixing them with bool costs several times as much as the arithmetic.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, lam: Tensor, dim: int) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        u = logits.to(dtype)
        slack = (1 - lam.to(dtype)).unsqueeze(dim)
        # An infinite lambda, or one of at least 1, would give finite weights on one path or the other.
        slack = torch.where((slack > 0) & (slack < torch.inf), slack, torch.nan)
        z = u - u.amax(dim, keepdim=True)
        find_support = _support_pairwise if z.shape[dim] <= PAIRWISE_MAX_EXPERTS else _support_sorted
        support = torch.empty(z.shape, dtype=dtype, device=z.device)
        find_support(z, slack, dim, support)
        k = support.sum(dim, keepdim=True)
        # p_i - 1/k is formed before 1/k is added: the backward for lambda needs it without cancellation.
        centred = (z - (z * support).sum(dim, keepdim=True).div_(k)).div_(slack)
        # A new tensor: compiled by torch 2.11, an output made in place, or by a cast to its dtype, has no gradient.
        probs = (centred + 1 / k).clamp_(min=0) * support
        ctx.save_for_backward(support, centred, slack)
        ctx.logits_dtype, ctx.lam_dtype, ctx.dim = logits.dtype, lam.dtype, dim
        return probs if probs.dtype == logits.dtype else probs.to(logits.dtype)

    @staticmethod
    def backward(ctx, grad_probs: Tensor) -> tuple[Tensor, Tensor, None]:
        support, centred, slack = ctx.saved_tensors
        grad = grad_probs.to(slack.dtype) * support
        mean = grad.sum(ctx.dim, keepdim=True).div_(support.sum(ctx.dim, keepdim=True))
        grad_logits = (grad - mean).mul_(support).div_(slack)
        grad_lam = (grad_logits * centred).sum(ctx.dim)
        return grad_logits.to(ctx.logits_dtype), grad_lam.to(ctx.lam_dtype), None


def sparsegen(logits: Tensor, lam: Tensor | float, dim: int = -1) -> Tensor:
    """Sparsegen routing weights.

    Args:
        logits: Router logits ``u``, ``(..., E)``, any float dtype.
        lam: lambda, ``(...)`` or broadcastable to it, or one number; below 1.
        dim: Where E is in the shape of ``logits``; fastest where E is not the innermost dimension.

    Returns:
        Weights on the simplex, ``(..., E)`` in the dtype of ``logits``; many are exactly 0, never all of them.
        A non-finite input, or lambda >= 1, gives a row of NaN; the layers check for that where they synchronise.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not isinstance(lam, Tensor):
        lam = torch.full((), lam, dtype=dtype, device=logits.device)  # as_tensor() would wait for a GPU
    lam = lam.to(logits.device, lam.dtype if lam.is_floating_point() else dtype)
    dim = dim % logits.dim()
    return _Sparsegen.apply(logits, lam.expand(logits.shape[:dim] + logits.shape[dim + 1 :]), dim)


def sparsegen_reference(logits: Tensor, lam: Tensor) -> Tensor:
    """The closed form of the module docstring, line by line, differentiated by autograd. Same arguments and result."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    u = logits.to(dtype)
    u = u - u.detach().amax(-1, keepdim=True)
    lam = lam.to(dtype).unsqueeze(-1)
    u_desc = u.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=dtype)
    sums = u_desc.cumsum(-1)
    k = (1 - lam + ranks * u_desc > sums).sum(-1, keepdim=True).clamp(min=1)
    tau = (sums.gather(-1, k - 1) - 1 + lam) / k
    return (torch.clamp(u - tau, min=0) / (1 - lam)).to(logits.dtype)
