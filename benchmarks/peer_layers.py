"""What `expert_layers.ours` is compared with: DeepSpeed's MoE layer, and the dispatch of AutoEP and torchtitan.

Shapes: `expert_layers`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from expert_layers import Formulation, Sizes, Weights, frozen, frozen_linear, ours
from torch import Tensor, nn
from torch.nn import functional as F
from traveling import waiting_at_once

from ldmole_ds.distributed import ExpertParallel

FROZEN, TOKENS, WEIGHTS = "frozen linear", "ours, tokens", "ours, weights"
AT_ONCE, BACKEND = "ours, tokens, no overlap", "ours, tokens, backend's exchange"
DEEPSPEED, PER_EXPERT = "DeepSpeed MoE", "per-(token, expert)"


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


def formulations(weights: Weights, sizes: Sizes, topology: ExpertParallel) -> dict[str, Formulation]:
    """All of them, by the name in the table."""
    tokens = ours(weights, sizes, topology, "tokens")
    made = {
        FROZEN: frozen(weights),
        TOKENS: tokens,
        AT_ONCE: replace(tokens, around=waiting_at_once),
        **({BACKEND: ours(weights, sizes, replace(topology, mailboxes=None), "tokens")} if topology.mailboxes else {}),
        WEIGHTS: ours(weights, sizes, topology, "weights"),
        PER_EXPERT: per_expert(weights, sizes, topology),
    }
    if sizes.in_features == sizes.out_features:  # DeepSpeed's layer has one width
        made[DEEPSPEED] = deepspeed_moe(weights, sizes, topology)
    return made
