"""How tokens meet their experts: the dispatchers' contract, and those that move tokens.

    run(x_TD, probs_TGE, experts, layer) -> y_TO, or what adds it to each projection's output

The result holds, for each token, the sum over *all* its experts of all G projections of an input group, wherever they
live. The unit of dispatch is (token, destination rank), not (token, expert): a token travels once to each remote rank
that holds at least one of its active experts in any projection of the group, with its D values and its G * E/P routing
weights for that rank. The answer is already the sum over that rank's experts: one vector of O values returns. The
gradient of a weight that is exactly 0 is only defined up to the router's support: no router here reads it.

Dispatchers own no parameters. Shape legend: T local tokens, D in_features, G projections, E experts, P = ep_size,
e = E/P local experts, S rows sent, R rows received, O summed out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldmole_ds.distributed.all_to_all import Channel, CommStats, all_to_all, exchange_counts, largest_of
from ldmole_ds.distributed.expert_exchange import DispatchPlan, RemoteExperts
from ldmole_ds.distributed.topology import ExpertParallel
from ldmole_ds.ops.expert_compute import choose_products
from ldmole_ds.ops.fused_routing import destinations_of
from ldmole_ds.ops.grouped_experts import GROUPED
from ldmole_ds.ops.grouped_update import GroupedUpdate, Update
from ldmole_ds.ops.lora_experts import lora_experts, lora_experts_reference
from ldmole_ds.ops.low_rank_update import LowRankUpdate
from ldmole_ds.ops.shared_input import shared_input


@dataclass(frozen=True)
class ExpertWeights:
    """The local experts of an input group, and how their sum is wanted.

    Attributes:
        lora_A: ``(G, e, r, D)``.
        lora_B: G times ``(e, r, O_g)``.
        scaling: ``lora_alpha / r``.
        low_rank: The caller takes `Update`s where the experts meet the tokens here: the sum in parts, which it adds to
            the frozen projections' outputs without a tensor of their size.
        h: ``x A^T``, G times ``(e * r, T)``, if the caller has computed it (`may_be_grouped` said no).
    """

    lora_A: Tensor
    lora_B: Sequence[Tensor]
    scaling: float
    low_rank: bool = False
    h: Sequence[Tensor] | None = None


def read_on_host(numbers: Tensor) -> list:
    """The one device-to-host synchronisation of a dispatch: the sizes of what is sent and received."""
    return numbers.tolist()


def raise_non_finite(layer: str, ranks: list[int] | None = None) -> None:
    """One clear error for NaN or infinite router logits or lambda."""
    where = "" if ranks is None else f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    raise FloatingPointError(
        f"non-finite routing in {layer}{where}: the router's logits or lambda hold NaN or infinity. Lower the learning "
        "rate, check the data for corrupt rows, or use bf16 or fp32 instead of fp16"
    )


def apply_experts(x_TD: Tensor, probs_TGE: Tensor, experts: ExpertWeights) -> Tensor | list[Update]:
    """All experts of these tokens are at hand: their sum ``(T, O)``, or what adds it for each projection."""
    w_TGE = probs_TGE.to(x_TD.dtype)
    return expert_updates(x_TD, w_TGE, experts) if experts.low_rank else expert_sum(x_TD, w_TGE, experts)


def expert_sum(x_TD: Tensor, w_TGe: Tensor, experts: ExpertWeights) -> Tensor:
    """The sum over these experts, ``(T, O)``."""
    products = choose_products(w_TGe, experts.lora_A, experts.lora_B)
    return lora_experts(x_TD, w_TGe, experts.lora_A, experts.lora_B, experts.scaling, products)


def expert_updates(x_TD: Tensor, w_TGe: Tensor, experts: ExpertWeights) -> list[Update]:
    """What adds the sum over these experts to each projection's output; dense for sure where ``experts.h`` is given."""
    lora_A, lora_B, scaling, h = experts.lora_A, experts.lora_B, experts.scaling, experts.h
    if h is None and choose_products(w_TGe, lora_A, lora_B) is GROUPED:
        factors = zip(w_TGe.split(1, dim=1), lora_A.split(1), lora_B, strict=True)
        return [GroupedUpdate(x_TD, w_T1e, A_1, B, scaling) for w_T1e, A_1, B in factors]
    if h is None:
        h, *_ = shared_input(x_TD, lora_A, None, None)
    factors = zip(h, w_TGe.permute(1, 2, 0).unbind(0), lora_B, strict=True)
    return [LowRankUpdate(h_XT, p_eT, B, scaling) for h_XT, p_eT, B in factors]


class LocalTokenDispatcher:
    """All experts are here (``ep_size == 1`` or a replicated layer): the base class and the reference."""

    ep_size = 1
    # Whether local tokens meet the local experts as they are, so that x A^T may be computed before routing is known.
    experts_are_here = True
    # Whether rows travel in the steps of `RemoteExperts`, so that the caller can work meanwhile.
    overlaps = False

    def __init__(self, stats: CommStats | None = None) -> None:
        self.stats = stats or CommStats()

    def gathered(self, experts: ExpertWeights, layer: str) -> ExpertWeights:
        """All experts of an input group, from those held here."""
        return experts

    def run(self, x_TD: Tensor, probs_TGE: Tensor, experts: ExpertWeights, layer: str) -> Tensor | list[Update]:
        """See the module docstring."""
        return apply_experts(x_TD, probs_TGE, self.gathered(experts, layer))


class AllToAllTokenDispatcher(LocalTokenDispatcher):
    """``--expert_dispatch tokens``: tokens travel to the experts, results travel back.

    Tokens of this rank meet this rank's experts while the others are on their way; they are not part of the exchange.
    A caller with more to do meanwhile goes step by step itself, from `begin`.

    Args:
        topology: Who holds which experts.
        stats: Counts what is moved.
        chunk_tokens: Dispatch at most this many of a rank's tokens at once. A rank then never holds more than ``P *
            chunk_tokens`` of its peers' tokens, however skewed the routing is: what arrived is sent again in backward
            instead of being kept. 0: all at once.
    """

    def __init__(self, topology: ExpertParallel, stats: CommStats | None = None, chunk_tokens: int = 0) -> None:
        super().__init__(stats)
        self.topology, self.chunk_tokens = topology, chunk_tokens
        self.ep_size = topology.ep_size
        self.overlaps = self.experts_are_here = not chunk_tokens

    def begin(
        self,
        x_TD: Tensor,
        probs_TGE: Tensor,
        experts: ExpertWeights,
        layer: str,
        destinations: Tensor | None = None,
    ) -> RemoteExperts:
        """Tokens leave for the other ranks. Counts and dispatch; the rest is `RemoteExperts`'.

        ``destinations``: what `destinations_of` finds, where routing has found it already.
        """
        channel = self.channel(layer)
        plan = self.plan(probs_TGE, channel, destinations)
        return RemoteExperts(x_TD, probs_TGE, plan, channel, experts.scaling, experts.lora_A, experts.lora_B)

    def own(self, probs_TGE: Tensor) -> Tensor:
        """Of the routing weights those of this rank's experts, ``(T, G, e)``."""
        e = probs_TGE.shape[-1] // self.ep_size
        return probs_TGE[..., self.topology.ep_rank * e : (self.topology.ep_rank + 1) * e]

    def run(self, x_TD: Tensor, probs_TGE: Tensor, experts: ExpertWeights, layer: str) -> Tensor:
        """See the module docstring. Counts, dispatch and combine forward; the twins of the last two backward."""
        channel = self.channel(layer)
        if not self.chunk_tokens:
            return self._run(x_TD, probs_TGE, experts, self.plan(probs_TGE, channel), channel)
        # Every rank runs as many chunks as the one with the most tokens; its own may be empty.
        num_tokens = torch.full((), x_TD.shape[0], device=x_TD.device)
        num_chunks = -(-largest_of(num_tokens, channel) // self.chunk_tokens)
        y = []
        for i in range(max(num_chunks, 1)):
            chunk = slice(i * self.chunk_tokens, (i + 1) * self.chunk_tokens)
            plan = self.plan(probs_TGE[chunk], channel)
            inputs = (x_TD[chunk], probs_TGE[chunk], experts, plan, channel)
            y.append(checkpoint(self._run, *inputs, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(y)

    def _run(
        self, x_TD: Tensor, probs_TGE: Tensor, experts: ExpertWeights, plan: DispatchPlan, channel: Channel
    ) -> Tensor:
        weights = (experts.lora_A, experts.lora_B)
        remote = RemoteExperts(x_TD, probs_TGE, plan, channel, experts.scaling, *weights)
        y_TO = expert_sum(x_TD, self.own(probs_TGE).to(x_TD.dtype), experts)
        remote.compute()
        return remote.add_to([y_TO])[0]

    def channel(self, layer: str) -> Channel:
        """The way of this layer's collectives."""
        return self.topology.channel(self.stats, layer)

    def plan(self, probs_TGE: Tensor, channel: Channel, destinations: Tensor | None = None) -> DispatchPlan:
        """Who sends which token where, from the support of the routing weights. One count exchange, one host sync.

        Raises:
            FloatingPointError: Routing is not finite on some rank of the EP group; raised on all of them.
        """
        p, own = self.ep_size, self.topology.ep_rank
        with torch.no_grad():
            if destinations is None:
                destinations = destinations_of(probs_TGE, p, own)
            counts = destinations.sum(1)
            sent = torch.stack([counts[:-1], counts[-1].expand(p)], dim=1)
            received = exchange_counts(sent, channel)
            (input_splits, _), (output_splits, flags) = read_on_host(torch.stack([sent, received]).transpose(1, 2))
            if any(flags):
                first = self.topology.rank - own
                raise_non_finite(channel.layer, [first + i for i, flag in enumerate(flags) if flag])
            # nonzero() would wait for the device to learn how many there are.
            visits = destinations[:-1].nonzero_static(size=sum(input_splits))
            destination_S, token_index_S = visits.unbind(1)
        return DispatchPlan(
            own_rank=own,
            token_index_S=token_index_S,
            destination_S=destination_S,
            input_splits=input_splits,
            output_splits=output_splits,
        )


class ReferenceTokenDispatcher(AllToAllTokenDispatcher):
    """The same by the shortest way: autograd through two plain exchanges and the einsum experts. Tests compare."""

    def run(self, x_TD: Tensor, probs_TGE: Tensor, experts: ExpertWeights, layer: str) -> Tensor:
        """See the module docstring."""
        channel, p = self.channel(layer), self.ep_size
        plan = self.plan(probs_TGE, channel)
        t, g, e = probs_TGE.shape
        d, splits = x_TD.shape[1], (plan.output_splits, plan.input_splits)
        w_TPGe = probs_TGE.to(x_TD.dtype).view(t, g, p, e // p).transpose(1, 2)
        x_RD = all_to_all(x_TD[plan.token_index_S], *splits, channel, "dispatch")
        w_RGe = all_to_all(w_TPGe[plan.token_index_S, plan.destination_S], *splits, channel, "dispatch")
        x = torch.cat([x_TD, x_RD])
        w = torch.cat([w_TPGe[:, plan.own_rank], w_RGe])
        y = lora_experts_reference(x, w, experts.lora_A, experts.lora_B, experts.scaling)
        assert x.shape[1] == d
        y_SO = all_to_all(y[t:], *splits[::-1], channel, "combine")
        return y[:t].index_add(0, plan.token_index_S, y_SO)
