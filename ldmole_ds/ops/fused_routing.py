"""All of an input group's routing in one kernel: from logits to weights, statistics and dispatch plan.

Shape legend: T tokens, G projections, E experts, P = ep_size, B blocks of tokens.

    u (G, E, T), a (T,) -> lambda = logsigmoid(a) + 0.99, p = sparsegen(u, lambda), and of them
        for the auxiliary losses and reports    sums over tokens
        for expert parallelism                  which ranks each token visits

In plain operations that is about 40 small kernels per input group forward and 20 backward, which on a GPU cost more
than what they compute. `ldmole_ds.ops.routing_kernel` does it in one each; `routing_reference` is the same in plain
operations. Both are float32 inside.

The environment variable ``LDMOLE_FUSED_ROUTING`` decides who uses it (`uses_fused_routing`):

    auto    the default: wherever tensors are on a GPU and Triton can be imported
    off     never
    on      always; an error where it cannot run. On a CPU only Triton's interpreter can (``TRITON_INTERPRET=1``)
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmole_ds.ops.losses import router_z_sum, sparsity_sum
from ldmole_ds.ops.sparsegen import sparsegen

logger = logging.getLogger(__name__)

SWITCH = "LDMOLE_FUSED_ROUTING"
# lambda = logsigmoid(.) + (1 - eps), eps = 1e-2, stays below this.
LAMBDA_TOP = 1 - 1e-2
# Logits that a program holds in registers at a time, but for very many experts, which are all in one program.
TILE = 512


@dataclass(frozen=True)
class RoutingSpec:
    """What a routing pass is asked for.

    Attributes:
        dtype: Of the routing weights: that of the experts' products.
        target_num_experts: k of the sparsity loss.
        mask_padding: Whether padding is not routed. The sums of weights leave it out in any case.
        ep_size: Ranks that a token may visit; 0 where no tokens travel, and no plan is needed.
        own_rank: The rank that a token need not visit.
    """

    dtype: torch.dtype
    target_num_experts: int
    mask_padding: bool = True
    ep_size: int = 0
    own_rank: int = 0


class Routing(NamedTuple):
    """What comes out.

    Attributes:
        probs_GET: Routing weights in the spec's dtype, 0 for tokens that are not routed, NaN for broken ones.
        lam_T: lambda, float32, without gradient (`sums` has it).
        sums: ``(B, G, 2 E + 3)`` float32; added up over B (`RoutingSums`) they are sums over tokens.
        destinations: ``(P + 1, T)`` uint8 or bool: where a token visits a rank; the last row, where its routing is not
            finite. None without a plan.
    """

    probs_GET: Tensor
    lam_T: Tensor
    sums: Tensor
    destinations: Tensor | None


@dataclass(frozen=True)
class RoutingSums:
    """`Routing.sums` added up, by name: sums over tokens for J projections, float64.

    Attributes:
        active_JE: Real tokens that give each expert a non-zero weight; no gradient.
        probs_JE: Routing weights of the real tokens.
        sparsity_J: ``relu(lower_k - lambda)`` of the routed tokens.
        router_z_J: ``logsumexp(u)^2`` of the routed tokens.
        broken_J: Tokens with a non-finite logit or lambda, padding included; no gradient.
    """

    active_JE: Tensor
    probs_JE: Tensor
    sparsity_J: Tensor
    router_z_J: Tensor
    broken_J: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> RoutingSums:
        """From ``(B, J, 2 E + 3)``."""
        total = sums.sum(0, dtype=torch.float64)
        num_experts = (sums.shape[-1] - 3) // 2
        active, probs, rest = total.split([num_experts, num_experts, 3], dim=-1)
        sparsity, router_z, broken = rest.unbind(-1)
        return cls(active.detach(), probs, sparsity, router_z, broken.detach())


@functools.cache
def _triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_without_triton() -> None:
    logger.warning("Triton cannot be imported: routing runs as many small kernels. Install triton (docs/gpu.md)")


def uses_fused_routing(logits: Tensor) -> bool:
    """Whether the routing of these logits is left to the kernel; see the module docstring.

    float64 always goes the plain way (the kernel computes in float32), and so does all that ``torch.compile`` traces,
    which fuses by itself.

    Raises:
        ValueError: The environment variable has no known value, or asks for what cannot run.
    """
    if torch.compiler.is_compiling() or logits.dtype == torch.float64:
        return False
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "on", "off"):
        raise ValueError(f"{SWITCH}={switch!r} is not known: use auto, on or off")
    if switch == "off" or (switch == "auto" and not logits.is_cuda):
        return False
    if switch == "auto":
        if not _triton_is_here():
            _warn_without_triton()
        return _triton_is_here()
    if not _triton_is_here():
        raise ValueError(f"{SWITCH}=on, but Triton cannot be imported: install triton, or unset it")
    if not logits.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{SWITCH}=on, but the tensors are on the CPU: unset it, or set TRITON_INTERPRET=1 (slow)")
    return True


def _tiles(num_experts: int, num_tokens: int) -> tuple[int, int, int]:
    """``E_PAD, BLOCK_T`` and the number of programs; at least one, which then writes sums of nothing."""
    e_pad = max(2, 1 << (num_experts - 1).bit_length())
    block = max(16, TILE // e_pad)
    return e_pad, block, max(1, -(-num_tokens // block))


class _FusedRouting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_GET: Tensor, lambda_logit_T: Tensor, mask_T: Tensor | None, spec: RoutingSpec):
        from ldmole_ds.ops.routing_kernel import routing_forward_kernel

        logits_GET, lambda_logit_T = logits_GET.contiguous(), lambda_logit_T.contiguous()
        (g, e, t), device = logits_GET.shape, logits_GET.device
        e_pad, block, programs = _tiles(e, t)
        mask = None if mask_T is None else mask_T.contiguous().view(torch.uint8)
        probs = torch.empty(g, e, t, dtype=spec.dtype, device=device)
        lam = torch.empty(t, dtype=torch.float32, device=device)
        sums = torch.empty(programs, g, 2 * e + 3, dtype=torch.float32, device=device)
        plan = torch.empty(spec.ep_size + 1, t, dtype=torch.uint8, device=device) if spec.ep_size else None
        ctx.constants = {
            "LAMBDA_TOP": LAMBDA_TOP,
            "HAS_MASK": mask is not None,
            "MASK_PADDING": spec.mask_padding,
            "SPARSITY": spec.target_num_experts < e,
            "E_PAD": e_pad,
            "BLOCK_T": block,
            "num_warps": 4 if e_pad * block <= 4 * TILE else 8,
        }
        with torch.cuda.device_of(logits_GET):
            routing_forward_kernel[(programs,)](
                logits_GET,
                lambda_logit_T,
                lam if mask is None else mask,
                probs,
                lam,
                sums,
                lam if plan is None else plan,
                t,
                e,
                g,
                spec.target_num_experts,
                max(spec.ep_size, 1),
                spec.own_rank,
                PLAN=plan is not None,
                **ctx.constants,
            )
        ctx.save_for_backward(logits_GET, lambda_logit_T, mask)
        ctx.target, ctx.programs = spec.target_num_experts, programs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lam, *([] if plan is None else [plan]))
        return probs, lam, sums, plan

    @staticmethod
    def backward(ctx, grad_probs: Tensor | None, _lam, grad_sums: Tensor | None, _plan):
        from ldmole_ds.ops.routing_kernel import routing_backward_kernel

        logits, lambda_logit, mask = ctx.saved_tensors
        g, e, t = logits.shape
        grad_logits, grad_lambda_logit = torch.empty_like(logits), torch.empty_like(lambda_logit)
        with torch.cuda.device_of(logits):
            routing_backward_kernel[(ctx.programs,)](
                logits,
                lambda_logit,
                logits if mask is None else mask,
                logits if grad_probs is None else grad_probs,
                logits if grad_sums is None else grad_sums,
                grad_logits,
                grad_lambda_logit,
                t,
                e,
                g,
                ctx.target,
                *((0, 0, 0) if grad_probs is None else grad_probs.stride()),
                *((0, 0, 0) if grad_sums is None else grad_sums.stride()),
                HAS_GRAD_PROBS=grad_probs is not None,
                HAS_GRAD_SUMS=grad_sums is not None,
                **ctx.constants,
            )
        return grad_logits, grad_lambda_logit, None, None


def fused_routing(logits_GET: Tensor, lambda_logit_T: Tensor, mask_T: Tensor | None, spec: RoutingSpec) -> Routing:
    """Routing of an input group in one kernel, and one for its backward.

    Args:
        logits_GET: Router logits, ``(G, E, T)``, float32 or half precision; T may be 0.
        lambda_logit_T: What the lambda MLP's last layer gives, before logsigmoid, ``(T,)``.
        mask_T: bool, True for tokens that are not padding; or None.
        spec: What is asked for.
    """
    return Routing(*_FusedRouting.apply(logits_GET, lambda_logit_T, mask_T, spec))


def routing_reference(logits_GET: Tensor, lambda_logit_T: Tensor, mask_T: Tensor | None, spec: RoutingSpec) -> Routing:
    """The same in plain operations, differentiated by autograd; one block of sums. In float64 for float64 input.

    A broken token that is counted makes sums NaN here; the kernel leaves it out. Both report it.
    """
    g, e, t = logits_GET.shape
    u = logits_GET.to(torch.promote_types(logits_GET.dtype, torch.float32))
    lam = F.logsigmoid(lambda_logit_T.to(u.dtype)) + LAMBDA_TOP
    real = torch.ones(t, dtype=torch.bool, device=u.device) if mask_T is None else mask_T
    routed = real if spec.mask_padding else None
    probs = sparsegen(u, lam, dim=1)
    counted = torch.where(real, probs, 0.0)
    probs = probs if routed is None else torch.where(routed, probs, 0.0)
    broken_GT = ~(u.isfinite().all(1) & lam.isfinite())
    by_token = u.permute(2, 0, 1)
    scalars = (
        sparsity_sum(by_token, lam, spec.target_num_experts, routed),
        router_z_sum(by_token, routed),
        broken_GT.sum(1),
    )
    sums = torch.cat([(counted > 0).sum(2), counted.sum(2), torch.stack(scalars, 1)], dim=1)
    plan = destinations_of(probs.permute(2, 0, 1), spec.ep_size, spec.own_rank) if spec.ep_size else None
    return Routing(probs.to(spec.dtype), lam.detach(), sums.unsqueeze(0), plan)


@torch.no_grad()
def destinations_of(probs_TGE: Tensor, ep_size: int, own_rank: int) -> Tensor:
    """`Routing.destinations` from routing weights: ``(T, G, E) -> (P + 1, T)`` bool."""
    t, g, e = probs_TGE.shape
    # A maximum keeps NaN and infinity, and along the tokens it is much quicker than any().
    largest_PT = probs_TGE.permute(1, 2, 0).view(g, ep_size, e // ep_size, t).abs().amax((0, 2))
    destinations = torch.empty(ep_size + 1, t, dtype=torch.bool, device=probs_TGE.device)
    torch.ne(largest_PT, 0, out=destinations[:-1])
    destinations[own_rank] = False
    torch.ne(largest_PT.mul_(0).sum(0), 0, out=destinations[-1])
    return destinations
