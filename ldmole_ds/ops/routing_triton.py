"""`ldmole_ds.ops.fused_routing` on a GPU: launches the kernels of ``routing_kernel.py``.

Shape legend: T tokens, G projections, E experts, P = ep_size, B programs.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ldmole_ds.ops.routing_spec import LAMBDA_TOP, RoutingSpec
from ldmole_ds.ops.triton_launch import launch

# From here on blocks of 32 tokens give every processor of a GPU several.
MANY_TOKENS = 8192


@functools.cache
def is_here() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def tiles(num_experts: int, num_tokens: int) -> tuple[int, int, int]:
    """``E_PAD, BLOCK_T`` and the number of programs; at least one, which then writes sums of nothing.

    Blocks are small where tokens are few, so that every processor of the GPU has some.
    """
    e_pad = max(2, 1 << (num_experts - 1).bit_length())
    block = 32 if num_tokens > MANY_TOKENS and e_pad <= 16 else 16
    return e_pad, block, max(1, -(-num_tokens // block))


def constants(
    num_experts: int, mask: Tensor | None, target: int, mask_padding: bool, e_pad: int, block: int
) -> dict[str, object]:
    """What both pairs of kernels are compiled for."""
    return {
        "LAMBDA_TOP": LAMBDA_TOP,
        "HAS_MASK": mask is not None,
        "MASK_PADDING": mask_padding,
        "SPARSITY": target < num_experts,
        "E_PAD": e_pad,
        "BLOCK_T": block,
        "num_warps": 4 if e_pad * block <= 2048 else 8,
    }


def forward(logits: Tensor, lambda_logit: Tensor, mask: Tensor | None, spec: RoutingSpec) -> tuple:
    """``probs (G, E, T), lam (T,), sums (B, G, 2 E + 3), destinations (P + 1, T) or None``; contiguous arguments."""
    (g, e, t), device = logits.shape, logits.device
    e_pad, block, programs = tiles(e, t)
    probs = torch.empty(g, e, t, dtype=spec.dtype, device=device)
    lam = torch.empty(t, dtype=torch.float32, device=device)
    sums = torch.empty(programs, g, 2 * e + 3, dtype=torch.float32, device=device)
    plan = torch.empty(spec.ep_size + 1, t, dtype=torch.uint8, device=device) if spec.ep_size else None
    launch(
        "routing_kernel.routing_forward_kernel",
        programs,
        *(logits, lambda_logit, lam if mask is None else mask, probs, lam, sums, lam if plan is None else plan),
        *(t, e, g, spec.target_num_experts, max(spec.ep_size, 1), spec.own_rank),
        PLAN=plan is not None,
        **constants(e, mask, spec.target_num_experts, spec.mask_padding, e_pad, block),
    )
    return probs, lam, sums, plan


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
    e_pad, block, programs = tiles(e, t)
    grad_logits, grad_lambda_logit = torch.empty_like(logits), torch.empty_like(lambda_logit)
    given = [logits if x is None else x for x in (mask, grad_probs, grad_sums)]
    launch(
        "routing_kernel.routing_backward_kernel",
        programs,
        *(logits, lambda_logit, *given, grad_logits, grad_lambda_logit),
        *(t, e, g, spec.target_num_experts),
        *((0, 0, 0) if grad_probs is None else grad_probs.stride()),
        *((0, 0, 0) if grad_sums is None else grad_sums.stride()),
        HAS_GRAD_PROBS=grad_probs is not None,
        HAS_GRAD_SUMS=grad_sums is not None,
        **constants(e, mask, spec.target_num_experts, spec.mask_padding, e_pad, block),
    )
    return grad_logits, grad_lambda_logit
