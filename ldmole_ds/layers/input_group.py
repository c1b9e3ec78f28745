"""Input groups: the projections that read one tensor share dropout, lambda, router pass and dispatch.

A Llama layer has four: q/k/v, o, gate/up, down. The group runs once; each member takes its slice.

    x -> dropout -> logits of all members, lambda -> routing weights -> dispatch -> experts of all members -> combine

How the members find each other. Hugging Face models call q, k and v one after another on the same tensor, or (under
ZeRO-3) on different tensor objects over one storage: `ldmole_ds.layers.member_results`.

Where tokens travel the first member also runs the frozen layers of all members, while rows are on their way
(`ldmole_ds.layers.overlapped_group`); so it does where one node can be made of them all (`whole_group`).

Shape legend: T tokens, D in_features, G members, E experts, e local experts, r rank, O summed out_features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldmole_ds.distributed import ExpertParallel, ExpertWeights, LocalTokenDispatcher
from ldmole_ds.distributed.deepspeed_groups import mark_expert_parameter
from ldmole_ds.distributed.zero import is_zero3_parameter
from ldmole_ds.layers.context import ContextHolder, ForwardContext, RoutingRecord, in_backward
from ldmole_ds.layers.lambda_mlp import LambdaMLP
from ldmole_ds.layers.member_results import MemberResults
from ldmole_ds.layers.overlapped_group import overlapped_group
from ldmole_ds.layers.routers import Router
from ldmole_ds.layers.whole_group import runs_whole, whole_group
from ldmole_ds.ops.autocast import without_autocast
from ldmole_ds.ops.dropout import dropout
from ldmole_ds.ops.expert_compute import may_be_grouped
from ldmole_ds.ops.fused_routing import fused_routing, uses_fused_routing
from ldmole_ds.ops.grouped_update import Update
from ldmole_ds.ops.planned import on_gpu
from ldmole_ds.ops.routing_spec import RoutingSpec
from ldmole_ds.ops.shared_input import shared_input


def seeded_generator(seed: int, *names: object) -> torch.Generator:
    """A generator that depends on the seed and the names only: not on rank, layout or the order of creation."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


class InputGroup(nn.Module):
    """Router, lambda and experts of the projections ``members``, which read the same input of width ``in_features``.

    Args:
        name: Unique name, used in errors and reports.
        members: Full module names of the projections, in call order.
        in_features: D.
        out_features: O_g of each member.
        num_experts: E, over all ranks.
        r: Rank of each expert.
        scaling: ``lora_alpha / r``.
        dropout: Probability; the mask is drawn once, before dispatch, so it does not depend on ``ep_size``.
        router: How routing weights are made.
        lambda_mlp: Shared (registered elsewhere) or owned; None for routers without lambda.
        owns_lambda_mlp: Whether ``lambda_mlp`` is registered here.
        topology: Which experts are held here.
        dispatcher: How tokens meet their experts.
        holder: Where the running forward pass is found.
        mask_padding: Padding is not routed.
        seed, dtype, device: Of the parameters. Expert i of a projection starts from (seed, projection, i) alone.
    """

    def __init__(
        self,
        *,
        name: str,
        members: list[str],
        in_features: int,
        out_features: list[int],
        num_experts: int,
        r: int,
        scaling: float,
        dropout: float,
        router: Router,
        lambda_mlp: LambdaMLP | None,
        owns_lambda_mlp: bool,
        topology: ExpertParallel,
        dispatcher: LocalTokenDispatcher,
        holder: ContextHolder,
        mask_padding: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.name, self.members = name, list(members)
        self.in_features, self.out_features = in_features, list(out_features)
        self.num_experts, self.r, self.scaling, self.dropout = num_experts, r, scaling, dropout
        self.router, self.topology, self.dispatcher, self.holder = router, topology, dispatcher, holder
        self.mask_padding = mask_padding
        self.partitioned = topology.partitions(num_experts)
        if owns_lambda_mlp:
            self.lambda_mlp = lambda_mlp
        else:
            self.__dict__["lambda_mlp"] = lambda_mlp
        self.results = MemberResults(self.members)
        self._is_whole = False
        # Filled by the adapted layers, which own their frozen layers: not registered here.
        self.__dict__["layers"] = [None] * len(members)

        local = topology.local_experts(num_experts)
        bound = 1 / math.sqrt(in_features)

        def uniform(*shape: int, names: tuple) -> Tensor:
            return (torch.rand(*shape, generator=seeded_generator(seed, *names)) * 2 - 1) * bound

        def parameter(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.to(device=device, dtype=dtype))

        gate = [uniform(num_experts, in_features, names=(m, "router")) for m in members]
        lora_A = [torch.stack([uniform(r, in_features, names=(m, "lora_A", i)) for i in local]) for m in members]
        self.gate = parameter(torch.stack(gate)) if router.uses_gate else None
        self.lora_A = parameter(torch.stack(lora_A))
        self.lora_B = nn.ParameterList([parameter(torch.zeros(len(local), r, o)) for o in out_features])
        if self.partitioned:
            for param in self.expert_parameters():
                mark_expert_parameter(param, topology.group_name, topology.edp_group)

    def expert_parameters(self) -> list[nn.Parameter]:
        """``lora_A (G, e, r, D)`` and every ``lora_B (e, r, O_g)``: those that expert parallelism partitions."""
        return [self.lora_A, *self.lora_B]

    @property
    def overlaps(self) -> bool:
        """Whether the group runs its frozen layers itself, while tokens travel."""
        return getattr(self.dispatcher, "overlaps", False)

    def gives_outputs(self, member: int, x: Tensor) -> bool:
        """Whether the group runs the frozen layers of all members itself: in one node, or while tokens travel."""
        if member == 0 or self.results.pending is None:
            self._is_whole = runs_whole(self, x)
        return self.overlaps or self._is_whole

    def output_of(self, member: int, x: Tensor) -> Tensor:
        """``W x`` and the update for one member, ``(..., D) -> (..., O_g)``; where the group `gives_outputs`."""
        return self.results.take(member, x, lambda: self(x, with_frozen=True))

    def update_of(self, member: int, x: Tensor, hand_on: bool = False) -> Tensor | Update:
        """The update for one member, as it is or in factors.

        ``hand_on``: the caller reads ``results.handed_on`` instead of x, in a `frozen_product`.
        """
        # ZeRO-3 holds lora_B together only while this module runs, and torch.compile fuses by itself.
        low_rank = not torch.compiler.is_compiling() and not is_zero3_parameter(self.lora_A)
        return self.results.take(member, x, lambda: self(x, low_rank=low_rank, hand_on=hand_on and low_rank))

    def clear(self) -> None:
        """Forget a result that not all members have taken (they need not all be called)."""
        self.results.clear()

    def forward(
        self, x: Tensor, low_rank: bool = False, with_frozen: bool = False, hand_on: bool = False
    ) -> Sequence[Tensor | Update]:
        """``(..., D) -> G updates (..., O_g)`` in the dtype of ``x``; with ``low_rank`` in factors where there are.

        ``with_frozen``: the frozen layers' outputs with their updates instead (`gives_outputs`). ``hand_on``: see
        `update_of`.
        """
        context = self._context()
        if with_frozen and not self.overlaps:
            return whole_group(self, x, context)
        # Autocast would compute the router in half precision and mix the dtypes of the experts' products.
        with without_autocast(x):
            raw_TD = x.reshape(-1, self.in_features)
            x_TD = raw_TD.to(self.lora_A.dtype)
            if self.dropout and self.training:
                x_TD = dropout(x_TD, self.dropout)
            same, mask_T, in_factors = x_TD is raw_TD, context.token_mask(x), low_rank or with_frozen
            h, probs_TGE, destinations, next_TD = self._route(x_TD, mask_T, context, in_factors, hand_on and same)
            self.results.handed_on = (next_TD if same else raw_TD) if hand_on else None
            experts = ExpertWeights(self.lora_A, list(self.lora_B), self.scaling, low_rank, h)
            if not with_frozen:
                updates = self.dispatcher.run(x_TD, probs_TGE, experts, self.name)
                if not isinstance(updates, Tensor):
                    return updates
                y = updates.to(x.dtype).view(*x.shape[:-1], updates.shape[-1])
                return y.split(self.out_features, dim=-1)
            remote = self.dispatcher.begin(x_TD, probs_TGE, experts, self.name, destinations)
        return overlapped_group(self, x, x_TD, probs_TGE, experts, remote)

    def _context(self) -> ForwardContext:
        context = self.holder.current
        if context is None:
            if in_backward():
                raise RuntimeError(
                    "activation checkpointing was switched on behind the adapter's back: call "
                    "gradient_checkpointing_enable() on the LDMoLEModel (use_reentrant=False), not on the base model"
                )
            context = ForwardContext(recording=False)
        return context

    def _route(
        self, x_TD: Tensor, mask_T: Tensor | None, context: ForwardContext, low_rank: bool, hand_on: bool
    ) -> tuple[Sequence[Tensor] | None, Tensor, Tensor | None, Tensor]:
        """``x A^T`` by projection where it is sure to be used; routing weights ``(T, G, E)``; where tokens go; x.

        The first is not computed where the dispatcher has no use for it, or where routing may leave few experts to
        compute. The weights are zero for tokens that are not routed, and float32 but for the GPU kernel's. In memory
        both have the tokens innermost. Where tokens go is None unless they travel and the kernel has found it
        (`Routing.destinations`).
        """
        num_tokens, num_members = x_TD.shape[0], len(self.members)
        lora_A = first_layer = lam_T = live_units_H = None
        here = low_rank and getattr(self.dispatcher, "experts_are_here", False)
        if here and not may_be_grouped(num_tokens, self.lora_A, self.out_features):
            lora_A = self.lora_A
        if self.router.uses_lambda:
            first_layer = self.lambda_mlp.first_layer
        h, logits, hidden_HT, x_TD = shared_input(x_TD, lora_A, self.gate, first_layer, hand_on and lora_A is not None)
        if logits is None:
            logits = x_TD.new_zeros(num_members * self.num_experts, num_tokens, dtype=torch.float32)
        logits, sums, destinations = logits.view(num_members, self.num_experts, num_tokens), None, None
        if hidden_HT is not None and uses_fused_routing(logits):  # the one router with lambda is Sparsegen
            lambda_logit_T, live_units_H = self.lambda_mlp.logit_of(hidden_HT)
            ep_size = self.topology.ep_size if self.overlaps else 0
            target, own_rank = context.target_num_experts, self.topology.ep_rank
            dtype = x_TD.dtype if on_gpu(x_TD) else torch.float32
            spec = RoutingSpec(dtype, target, self.mask_padding, ep_size, own_rank)
            probs, lam_T, sums, destinations = fused_routing(logits, lambda_logit_T, mask_T, spec)
        else:
            if hidden_HT is not None:
                lam_T, live_units_H = self.lambda_mlp.lambda_of(hidden_HT)
            probs = self.router.weights(logits, lam_T)
            if mask_T is not None and self.mask_padding and context.has_padding():
                probs = torch.where(mask_T, probs, 0.0)
        logits, probs = logits.permute(2, 0, 1), probs.permute(2, 0, 1)
        if context.recording and self.gate is not None:
            context.records.append(RoutingRecord(self.name, logits, probs, lam_T, mask_T, live_units_H, sums))
        return h, probs, destinations, x_TD

    def extra_repr(self) -> str:
        held = self.topology.local_experts(self.num_experts)
        leaves = [m.rsplit(".", 1)[-1] for m in self.members]
        return f"members={leaves}, experts {held.start}..{held.stop - 1} of {self.num_experts}, r={self.r}"
