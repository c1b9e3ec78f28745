"""One exchange of tokens, forward and backward, against all experts in one place: does this backend compute it right?

With several ranks the dispatchers run as in training. A single rank has nobody to send to, so there every token is sent
to the rank itself, through the same collectives: the NCCL path can be tried on one GPU. Each token then meets the
experts twice, at home and through the exchange: output and gradients are twice those of the experts alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed import (
    AllToAllTokenDispatcher,
    Channel,
    ExpertParallel,
    ExpertWeights,
    LocalTokenDispatcher,
    WeightGatherDispatcher,
    expert_parallel,
)
from ldmole_ds.distributed.all_to_all import exchange_counts
from ldmole_ds.distributed.expert_exchange import DispatchPlan

TOLERANCE = 1e-5
_TOKENS, _IN, _OUT, _R = 64, 48, (32, 16), 4


@dataclass(frozen=True)
class ExchangeCheck:
    """A dispatcher's verdict.

    Attributes:
        dispatch: tokens or weights.
        difference: Largest norm-wise relative difference of the output and of every gradient, on any rank.
        calls: Collectives of this rank.
        passed: Whether the difference is within `TOLERANCE`.
    """

    dispatch: str
    difference: float
    calls: int
    passed: bool


class LoopbackDispatcher(AllToAllTokenDispatcher):
    """For a group of one rank: every token travels to its own rank, which the real dispatcher never lets it do."""

    def plan(self, probs_TGE: Tensor, channel: Channel) -> DispatchPlan:
        """All tokens, counted by the same exchange."""
        t, device = probs_TGE.shape[0], probs_TGE.device
        received = exchange_counts(torch.tensor([[t, 0]], device=device), channel)
        rows = torch.arange(t, device=device)
        return DispatchPlan(
            own_rank=0,
            token_index_S=rows,
            destination_S=torch.zeros_like(rows),
            input_splits=[t],
            output_splits=[int(received[0, 0])],
        )


def exchange_groups(ep_size: int | None = None) -> ExpertParallel:
    """Who exchanges tokens with whom. Collective.

    Args:
        ep_size: Ranks of an EP group, all by default. A job of one rank gets a group of itself.

    Raises:
        ValueError: It does not divide the ranks, or is 1 of several, where nothing would be exchanged.
    """
    world_size = dist.get_world_size()
    if world_size == 1 and ep_size in (None, 1):
        return ExpertParallel(ep_group=dist.group.WORLD, edp_group=dist.group.WORLD)
    if ep_size == 1:
        raise ValueError("with --ep_size 1 no tokens are exchanged: leave it out, or give 2 or more")
    return expert_parallel(world_size if ep_size is None else ep_size)


def check_exchange(topology: ExpertParallel, device: torch.device) -> list[ExchangeCheck]:
    """Both dispatchers against `LocalTokenDispatcher` with all experts. Collective over the whole job.

    Args:
        topology: Of `exchange_groups`.
        device: Where tensors are; the group's backend must take it.
    """
    alone = topology.ep_size == 1
    inputs = _inputs(topology, device)
    expected = _run(LocalTokenDispatcher(), inputs)
    experts = topology.local_experts(inputs[1].shape[-1])
    held = slice(experts.start, experts.stop)
    for index, dim in ((3, 1), *((4 + g, 0) for g in range(len(_OUT)))):
        # An expert's gradient is the sum over all tokens of the EP group.
        dist.all_reduce(expected[index], group=topology.ep_group)
        expected[index] = expected[index].narrow(dim, held.start, len(experts))
    own = [*inputs[:2], inputs[2][:, held], *(b[held] for b in inputs[3:])]
    tokens = LoopbackDispatcher if alone else AllToAllTokenDispatcher
    checks = []
    for name, kind in (("tokens", tokens), ("weights", WeightGatherDispatcher)):
        dispatcher = kind(topology)
        found = _run(dispatcher, own)
        times = 2 if alone and name == "tokens" else 1
        pairs = [(a, times * b) for a, b in zip(found, expected, strict=True)]
        worst = torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).nan_to_num(torch.inf).max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        checks.append(ExchangeCheck(name, worst.item(), dispatcher.stats.total_calls, worst.item() < TOLERANCE))
    return checks


def _inputs(topology: ExpertParallel, device: torch.device) -> list[Tensor]:
    """This rank's tokens and routing weights, of which about half are zero, and all experts, which all ranks share."""
    num_experts = 8 if 8 % topology.ep_size == 0 else topology.ep_size
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + topology.rank)
    tokens = _TOKENS + topology.rank % 3
    x = torch.randn(tokens, _IN, generator=own)
    probs = torch.randn(tokens, len(_OUT), num_experts, generator=own).relu()
    lora_A = torch.randn(len(_OUT), num_experts, _R, _IN, generator=shared)
    lora_B = [torch.randn(num_experts, _R, out, generator=shared) for out in _OUT]
    return [tensor.to(device) for tensor in (x, probs, lora_A, *lora_B)]


def _run(dispatcher: LocalTokenDispatcher, inputs: list[Tensor]) -> list[Tensor]:
    """Output, then the gradients of all inputs, for a fixed gradient of the output.

    The gradient of a routing weight of exactly 0 is left out: it is not defined.
    """
    x, probs, lora_A, *lora_B = leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = dispatcher.run(x, probs, ExpertWeights(lora_A, lora_B, 0.5), "the doctor's exchange")
    y.backward(torch.cos(torch.arange(y.numel(), device=y.device)).view_as(y))
    x_grad, probs_grad, *experts_grads = (leaf.grad for leaf in leaves)
    return [y.detach(), x_grad, probs_grad * (probs != 0), *experts_grads]
