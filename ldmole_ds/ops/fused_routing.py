"""All of an input group's routing in one kernel: from logits to weights, statistics and dispatch plan.

Shape legend: T tokens, G projections, E experts, P = ep_size, B blocks of tokens.

    u (G, E, T), a (T,) -> lambda = logsigmoid(a) + 0.99, p = sparsegen(u, lambda), and of them
        for the auxiliary losses and reports    sums over tokens
        for expert parallelism                  which ranks each token visits

In plain operations that is about 40 small kernels per input group forward and 20 backward, which cost more than what
they compute. `ldmole_ds.ops.routing_kernel` does it in one each on a GPU (Triton), ``csrc/routing.c`` on a CPU;
`routing_reference` is the same in plain operations. All are float32 inside.

The environment variable ``LDMOLE_FUSED_ROUTING`` decides who uses it (`uses_fused_routing`):

    auto    the default: on a GPU where Triton can be imported, on a CPU where there is a C compiler
    off     never
    on      always; an error where it cannot run. With ``TRITON_INTERPRET=1`` a CPU runs the GPU's kernel, to test it
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ldmole_ds.ops import cpu_kernels, routing_cpu, routing_triton
from ldmole_ds.ops.losses import router_z_sum, sparsity_sum
from ldmole_ds.ops.planned import is_planned_gpu, on_gpu, planned_cpu
from ldmole_ds.ops.routing_spec import LAMBDA_TOP, Routing, RoutingSpec
from ldmole_ds.ops.sparsegen import sparsegen

logger = logging.getLogger(__name__)

SWITCH = "LDMOLE_FUSED_ROUTING"


def uses_fused_routing(logits: Tensor) -> bool:
    """Whether the routing of these logits is left to the kernel; see the module docstring.

    float64 always goes the plain way (the kernel computes in float32), and so does what has no numbers: all that
    ``torch.compile`` traces, which fuses by itself, and fake tensors, unless they stand for a device's
    (`ldmole_ds.ops.planned`).

    Raises:
        ValueError: The environment variable has no known value, or asks for what cannot run.
    """
    if torch.compiler.is_compiling() or logits.dtype == torch.float64 or _is_traced():
        return False
    if isinstance(logits, FakeTensor) and not _is_planned(logits):
        return False
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "on", "off"):
        raise ValueError(f"{SWITCH}={switch!r} is not known: use auto, on or off")
    if switch == "off" or logits.is_meta:
        return False
    # The machine that plans for a GPU need not have Triton.
    missing = None if is_planned_gpu(logits) else _what_is_missing(backend_of(logits))
    if missing is not None and switch == "on":
        raise ValueError(f"{SWITCH}=on, but {missing}, or unset it")
    if missing is not None:
        _tell(missing, logits.is_cuda)
    return missing is None


def _is_traced() -> bool:
    """Whether operations are being written down (``make_fx``), which misses what the kernel in C does."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def backend_of(logits: Tensor) -> ModuleType:
    """Whose kernel serves tensors on this device."""
    interpreted = os.environ.get(SWITCH) == "on" and os.environ.get("TRITON_INTERPRET") == "1"
    return routing_triton if on_gpu(logits) or interpreted else routing_cpu


def _is_planned(logits: Tensor) -> bool:
    """Whether a fake tensor stands for one of a device whose kernel is known."""
    return is_planned_gpu(logits) or (planned_cpu(logits) is not None and backend_of(logits) is routing_cpu)


def _what_is_missing(backend: ModuleType) -> str | None:
    if backend is routing_triton:
        return None if routing_triton.is_here() else "Triton cannot be imported: install triton"
    reason = cpu_kernels.why_not()
    return None if reason is None else f"its C source was not built: {reason}: install a C compiler"


@functools.cache
def _tell(missing: str, is_cuda: bool) -> None:
    tell = logger.warning if is_cuda else logger.info
    tell(f"{missing} (docs/gpu.md). Until then routing runs as many small operations")


class _FusedRouting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_GET: Tensor, lambda_logit_T: Tensor, mask_T: Tensor | None, spec: RoutingSpec):
        logits, lambda_logit = logits_GET.contiguous(), lambda_logit_T.contiguous()
        mask = None if mask_T is None else mask_T.contiguous().view(torch.uint8)
        ctx.backend, ctx.spec = backend_of(logits), spec
        probs, lam, sums, plan = ctx.backend.forward(logits, lambda_logit, mask, spec)
        ctx.save_for_backward(logits, lambda_logit, mask)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lam, *([] if plan is None else [plan]))
        return probs, lam, sums, plan

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_probs: Tensor | None, _lam, grad_sums: Tensor | None, _plan):
        return *ctx.backend.backward(*ctx.saved_tensors, ctx.spec, grad_probs, grad_sums), None, None


def fused_routing(logits_GET: Tensor, lambda_logit_T: Tensor, mask_T: Tensor | None, spec: RoutingSpec) -> Routing:
    """Routing of an input group in one kernel, and one for its backward; for what `uses_fused_routing` says yes to.

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
