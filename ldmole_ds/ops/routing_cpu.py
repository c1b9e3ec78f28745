"""`ldmole_ds.ops.fused_routing` on a CPU: ``routing_cpu.c``, called with the tensors' addresses.

Shape legend: T tokens, G projections, E experts, P = ep_size.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ldmole_ds.ops import c_library
from ldmole_ds.ops.routing_spec import RoutingSpec

SOURCE = Path(__file__).with_name("routing_cpu.c")


@functools.cache
def _functions() -> tuple:
    library = c_library.load(SOURCE)
    address, number = ctypes.c_void_p, ctypes.c_int64
    library.routing_forward.argtypes = [address] * 7 + [number] * 6 + [ctypes.c_int]
    library.routing_backward.argtypes = [address] * 7 + [number] * 4 + [ctypes.c_int]
    return library.routing_forward, library.routing_backward


@functools.cache
def why_not() -> str | None:
    """Why the kernel cannot run here; None if it can. The first call builds it where that was not done before."""
    try:
        _functions()
    except c_library.NoCompilerError as error:
        return str(error)
    return None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(function, *args) -> None:
    if function(*args):
        raise MemoryError("no memory for the routing kernel's scratch space")


def forward(logits: Tensor, lambda_logit: Tensor, mask: Tensor | None, spec: RoutingSpec) -> tuple:
    """``probs (G, E, T), lam (T,), sums (1, G, 2 E + 3), destinations (P + 1, T) or None``; contiguous arguments."""
    g, e, t = logits.shape
    probs, lam = logits.new_empty(g, e, t, dtype=torch.float32), logits.new_empty(t, dtype=torch.float32)
    sums = logits.new_empty(1, g, 2 * e + 3, dtype=torch.float32)
    plan = logits.new_empty(spec.ep_size + 1, t, dtype=torch.uint8) if spec.ep_size else None
    logits, lambda_logit = logits.float(), lambda_logit.float()
    tensors = [_address(x) for x in (logits, lambda_logit, mask, probs, lam, sums, plan)]
    sizes = (t, e, g, spec.target_num_experts, spec.ep_size, spec.own_rank)
    _call(_functions()[0], *tensors, *sizes, spec.mask_padding)
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
    tensors = [_address(x) for x in (wide, wide_lambda, mask, grad_probs, grad_sums, grad_logits, grad_lambda)]
    _call(_functions()[1], *tensors, t, e, g, spec.target_num_experts, spec.mask_padding)
    return grad_logits.to(logits.dtype), grad_lambda.to(lambda_logit.dtype)
