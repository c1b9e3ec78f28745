"""`ldmole_ds.ops.fused_routing` on a CPU, by ``csrc/routing.c``.

Shape legend: T tokens, G projections, E experts, P = ep_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmole_ds.ops import cpu_kernels
from ldmole_ds.ops.routing_spec import RoutingSpec


def forward(logits: Tensor, lambda_logit: Tensor, mask: Tensor | None, spec: RoutingSpec) -> tuple:
    """``probs (G, E, T), lam (T,), sums (1, G, 2 E + 3), destinations (P + 1, T) or None``; contiguous arguments."""
    g, e, t = logits.shape
    probs, lam = logits.new_empty(g, e, t, dtype=torch.float32), logits.new_empty(t, dtype=torch.float32)
    sums = logits.new_empty(1, g, 2 * e + 3, dtype=torch.float32)
    plan = logits.new_empty(spec.ep_size + 1, t, dtype=torch.uint8) if spec.ep_size else None
    tensors = (logits.float(), lambda_logit.float(), mask, probs, lam, sums, plan)
    sizes = (t, e, g, spec.target_num_experts, spec.ep_size, spec.own_rank)
    cpu_kernels.call("routing_forward", *tensors, *sizes, spec.mask_padding)
    return probs.to(spec.dtype), lam, sums, plan


def backward(
    logits: Tensor,
    lambda_logit: Tensor,
    mask: Tensor | None,
    spec: RoutingSpec,
    grad_probs: Tensor | None,
    grad_sums: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and lambda logits, from those of weights and sums."""
    g, e, t = logits.shape
    wide, wide_lambda = logits.float(), lambda_logit.float()
    grad_probs, grad_sums = (None if x is None else x.float().contiguous() for x in (grad_probs, grad_sums))
    grad_logits, grad_lambda = torch.empty_like(wide), torch.empty_like(wide_lambda)
    tensors = (wide, wide_lambda, mask, grad_probs, grad_sums, grad_logits, grad_lambda)
    cpu_kernels.call("routing_backward", *tensors, t, e, g, spec.target_num_experts, spec.mask_padding)
    return grad_logits.to(logits.dtype), grad_lambda.to(lambda_logit.dtype)
