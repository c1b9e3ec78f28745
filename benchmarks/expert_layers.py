"""One adapted linear layer on the ranks of an EP group, in the formulations that the benchmarks compare.

    y = W x + scaling * sum_i p_i B_i A_i x        p = softmax over the k largest of G x

All have the same frozen weight, router and experts, so outputs and gradients must agree. Shapes: T tokens, D
in_features, O out_features, E experts, e = E/P of them local, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from traveling import waiting_at_once

from ldmole_ds.distributed import CommStats, ExpertParallel, build_dispatcher, expert_parallel
from ldmole_ds.layers import AdaptedLinear, InputGroup, build_router
from ldmole_ds.layers.context import ContextHolder


@dataclass(frozen=True)
class Sizes:
    """Sizes of the layer; ``tokens`` are those of a rank, ``k`` the experts of a token."""

    tokens: int
    in_features: int
    out_features: int
    experts: int
    r: int
    k: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Weights:
    """All experts: ``frozen (O, D)``, ``gate (E, D)``, ``lora_A (E, r, D)``, ``lora_B (E, r, O)``; and the input."""

    frozen: Tensor
    gate: Tensor
    lora_A: Tensor
    lora_B: Tensor
    x: Tensor
    cotangent: Tensor
    scaling: float = 2.0

    @classmethod
    def make(cls, sizes: Sizes, rank: int, device: torch.device) -> Weights:
        """The same weights on every rank, tokens of its own on each."""
        shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
        t, d, o, e, r = sizes.tokens, sizes.in_features, sizes.out_features, sizes.experts, sizes.r

        def normal(generator: torch.Generator, std: float, *shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(device, sizes.dtype)

        shapes = {"frozen": (o, d), "gate": (e, d), "lora_A": (e, r, d), "lora_B": (e, r, o)}
        stds = {"frozen": d**-0.5, "gate": d**-0.5, "lora_A": d**-0.5, "lora_B": 0.02}
        made = {name: normal(shared, stds[name], *shape) for name, shape in shapes.items()}
        return cls(**made, x=normal(own, 1.0, t, d), cotangent=normal(own, 1.0, t, o))


@dataclass(frozen=True)
class Formulation:
    """A layer, where its gradients are (``(E, D)``, ``(e, r, D)``, ``(e, r, O)``), and what a step runs within."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    gradients: Callable[[], dict[str, Tensor]]
    around: Callable[[], AbstractContextManager] = nullcontext

    def step(self, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward: the output and the gradient of ``x``."""
        for param in self.parameters:
            param.grad = None
        x = x.detach().requires_grad_()
        with self.around():
            y = self.forward(x)
            y.backward(cotangent)
        return y.detach(), x.grad


def frozen_linear(weights: Weights) -> nn.Linear:
    o, d = weights.frozen.shape
    layer = nn.Linear(d, o, bias=False, device=weights.frozen.device, dtype=weights.frozen.dtype)
    layer.weight.data = weights.frozen
    return layer.requires_grad_(False)


def frozen(weights: Weights) -> Formulation:
    return Formulation(frozen_linear(weights), [], dict)


def ours(weights: Weights, sizes: Sizes, topology: ExpertParallel, mode: str) -> Formulation:
    """This package's layer under ``--expert_dispatch mode``."""
    group = InputGroup(
        name="layer",
        members=["layer"],
        in_features=sizes.in_features,
        out_features=[sizes.out_features],
        num_experts=sizes.experts,
        r=sizes.r,
        scaling=weights.scaling,
        dropout=0.0,
        router=build_router("topk", topk=sizes.k),
        lambda_mlp=None,
        owns_lambda_mlp=False,
        topology=topology,
        dispatcher=build_dispatcher(topology, sizes.experts, mode, CommStats()),
        holder=ContextHolder(),
        mask_padding=True,
        seed=0,
        dtype=sizes.dtype,
        device=weights.x.device,
    )
    local = topology.local_experts(sizes.experts)
    with torch.no_grad():
        group.gate[0].copy_(weights.gate)
        group.lora_A[0].copy_(weights.lora_A[local.start : local.stop])
        group.lora_B[0].copy_(weights.lora_B[local.start : local.stop])
    layer = AdaptedLinear(frozen_linear(weights), group, 0)

    def gradients() -> dict[str, Tensor]:
        return {"gate": group.gate.grad[0], "A": group.lora_A.grad[0], "B": group.lora_B[0].grad}

    return Formulation(layer, list(group.parameters()), gradients)


class LoRAExpert(nn.Module):
    """An expert as DeepSpeed's MoE layer takes it: ``(..., D) -> (..., O)``."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scaling = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone()), scaling

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lora_A) @ self.lora_B * self.scaling


def deepspeed_moe(weights: Weights, sizes: Sizes, topology: ExpertParallel) -> Formulation:
    """``deepspeed.moe.layer.MoE`` without dropping, beside the frozen layer; needs D = O."""
    from deepspeed.moe.layer import MoE

    expert = LoRAExpert(weights.lora_A[0], weights.lora_B[0], weights.scaling)
    moe = MoE(sizes.in_features, expert, sizes.experts, topology.ep_size, sizes.k, drop_tokens=False, use_rts=False)
    moe.to(weights.x.device, sizes.dtype).set_deepspeed_parallelism()
    gate, experts = moe.deepspeed_moe.gate.wg, moe.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        gate.weight.copy_(weights.gate)
        for i, one in zip(topology.local_experts(sizes.experts), experts, strict=True):
            one.lora_A.copy_(weights.lora_A[i])
            one.lora_B.copy_(weights.lora_B[i])
    base = frozen_linear(weights)

    def gradients() -> dict[str, Tensor]:
        lora_A, lora_B = (torch.stack([getattr(e, n).grad for e in experts]) for n in ("lora_A", "lora_B"))
        return {"gate": gate.weight.grad, "A": lora_A, "B": lora_B}

    return Formulation(lambda x: base(x) + moe(x)[0], list(moe.parameters()), gradients)


class PerExpertDispatch(nn.Module):
    """The dropless dispatch of AutoEP and torchtitan with LoRA experts: one row per (token, expert), grouped GEMM.

    Rows are sorted by expert, sent by a variable all-to-all (own rows too), sorted again by local expert at the
    receiver, multiplied group by group, put back, returned, weighted and added.
    """

    def __init__(self, weights: Weights, sizes: Sizes, topology: ExpertParallel) -> None:
        super().__init__()
        local = topology.local_experts(sizes.experts)
        self.base, self.k, self.scaling = frozen_linear(weights), sizes.k, weights.scaling
        self.gate = nn.Parameter(weights.gate.clone())
        self.lora_A = nn.Parameter(weights.lora_A[local.start : local.stop].clone())
        self.lora_B = nn.Parameter(weights.lora_B[local.start : local.stop].clone())
        self.topology = topology

    def forward(self, x: Tensor) -> Tensor:
        num_experts, ranks = len(self.gate), self.topology.ep_size
        top, chosen = F.linear(x.float(), self.gate.float()).topk(self.k, dim=1)
        scores = top.softmax(1)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=num_experts).view(ranks, -1)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.topology.ep_group)
        splits = torch.stack([counts.sum(1), received.sum(1)]).tolist()
        rows = _all_to_all(x[order // self.k], *splits, self.topology.ep_group)
        # From (source, expert) to (expert, source).
        expert_of_row = torch.arange(received.shape[1], device=x.device).repeat(ranks)
        by_expert = expert_of_row.repeat_interleave(received.flatten()).argsort(stable=True)
        sizes = received.sum(0)
        y = grouped_mm(rows[by_expert], self.lora_A.transpose(1, 2), sizes)
        y = grouped_mm(y, self.lora_B, sizes)
        y = torch.empty_like(y).index_copy(0, by_expert, y)
        back = _all_to_all(y, *splits[::-1], self.topology.ep_group)
        per_slot = torch.empty_like(back).index_copy(0, order, back).view(*chosen.shape, -1)
        return self.base(x) + (per_slot * (scores * self.scaling).unsqueeze(-1)).sum(1).to(x.dtype)

    def gradients(self) -> dict[str, Tensor]:
        return {"gate": self.gate.grad, "A": self.lora_A.grad, "B": self.lora_B.grad}


def per_expert(weights: Weights, sizes: Sizes, topology: ExpertParallel) -> Formulation:
    layer = PerExpertDispatch(weights, sizes, topology)
    return Formulation(layer, [layer.gate, layer.lora_A, layer.lora_B], layer.gradients)


def grouped_mm(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """``(N, K), (e, K, M) -> (N, M)``: rows sorted by expert, each times its expert's matrix."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight, offs=sizes.cumsum(0, dtype=torch.int32))
    parts = zip(x.split(sizes.tolist()), weight.unbind(0), strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, input_splits, output_splits, group):
        ctx.args = (output_splits, input_splits, group)
        out = x.new_empty(sum(output_splits), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), output_splits, input_splits, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, *ctx.args), None, None, None


def _all_to_all(x: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    return _AllToAll.apply(x, input_splits, output_splits, group)


FROZEN, TOKENS, WEIGHTS = "frozen linear", "ours, tokens", "ours, weights"
AT_ONCE = "ours, tokens, no overlap"
DEEPSPEED, PER_EXPERT = "DeepSpeed MoE", "per-(token, expert)"


def formulations(weights: Weights, sizes: Sizes, topology: ExpertParallel) -> dict[str, Formulation]:
    """All of them, by the name in the table."""
    tokens = ours(weights, sizes, topology, "tokens")
    made = {
        FROZEN: frozen(weights),
        TOKENS: tokens,
        AT_ONCE: replace(tokens, around=waiting_at_once),
        WEIGHTS: ours(weights, sizes, topology, "weights"),
        PER_EXPERT: per_expert(weights, sizes, topology),
    }
    if sizes.in_features == sizes.out_features:  # DeepSpeed's layer has one width
        made[DEEPSPEED] = deepspeed_moe(weights, sizes, topology)
    return made


def expert_group() -> ExpertParallel:
    """One EP group of all ranks."""
    return expert_parallel(dist.get_world_size())
