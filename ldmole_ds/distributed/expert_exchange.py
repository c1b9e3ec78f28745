"""Dispatch, remote experts and combine in three steps, so that other work runs while rows travel.

    forward    dispatch leaves | work | experts of others' tokens, combine leaves | work | results are added
    backward   gradients of results leave | work | experts' gradients, gradients of tokens leave | work | added

The work is what the caller runs between the steps: its frozen projections and its own tokens' experts. Each step is a
node of the autograd graph. Nodes run backwards in the order in which they were made, last made first, so the work that
was done between two steps lies between them in backward as well, whatever modules it is made of.

Between steps a node's result is a buffer that is still being filled: only the next step reads it, and it waits first.
In backward no node returns it, where autograd might look at it: the next one takes it from the exchange.
The backward of dispatch is combine and the other way round: gradients of results travel the way the tokens went,
gradients of tokens and routing weights the way the results came. Shape legend: `ldmole_ds.distributed.dispatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_ds.distributed.all_to_all import Channel, Exchange
from ldmole_ds.ops.expert_compute import choose_products


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """What combine must know of a dispatch. Rows for the own rank are not part of it.

    Attributes:
        own_rank: This rank's index in the EP group.
        token_index_S: ``(S,) int64`` home row of each row sent, ordered by destination rank.
        destination_S: ``(S,) int64`` destination rank of each row sent, never ``own_rank``.
        input_splits: Rows sent to each rank, sum S.
        output_splits: Rows received from each rank, sum R.
    """

    own_rank: int
    token_index_S: Tensor
    destination_S: Tensor
    input_splits: list[int]
    output_splits: list[int]


def add_rows(total: Tensor, rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Add rows that came home to their tokens' in ``total (T, ...)``, in place; always in the same order.

    Peer by peer: a GPU adds the rows of one call in any order, and a token has at most one from each peer. A sum of
    other rounding would let recomputation route otherwise than the first pass did, and send other numbers of rows.
    """
    pieces = (t.split(plan.input_splits) for t in (plan.token_index_S, rows))
    for index, piece in zip(*pieces, strict=True):
        if len(index):
            total.index_add_(0, index, piece)
    return total


class _Flight:
    """The one exchange of an input group that is under way, in forward or in backward."""

    def __init__(self, plan: DispatchPlan, channel: Channel) -> None:
        self.plan, self.channel = plan, channel
        self._exchange: Exchange | None = None

    def send(self, rows: Tensor, phase: str) -> Tensor:
        """Rows leave: to the experts for dispatch and gradients of results, else home. Returns what will be filled."""
        splits = (self.plan.output_splits, self.plan.input_splits)
        outwards = phase in ("dispatch", "combine_backward")
        self._exchange = Exchange(rows, *(splits if outwards else splits[::-1]), self.channel, phase)
        return self._exchange.out

    def receive(self) -> Tensor:
        """Wait for what was sent last."""
        exchange, self._exchange = self._exchange, None
        return exchange.wait()


class _Dispatch(torch.autograd.Function):
    """``x (T, D), probs (T, G, E)`` -> rows ``(R, D + G * e)`` that are on their way."""

    @staticmethod
    def forward(ctx, x_TD, probs_TGE, flight):
        plan, num_ranks = flight.plan, flight.channel.size
        t, g, num_experts = probs_TGE.shape
        ctx.flight, ctx.shapes, ctx.dtype = flight, (x_TD.shape, probs_TGE.shape), probs_TGE.dtype
        # One row for each (token, rank): the weights of the rank's experts.
        w_TPGe = probs_TGE.view(t, g, num_ranks, num_experts // num_ranks).transpose(1, 2)
        slot_S = plan.token_index_S * num_ranks + plan.destination_S
        ctx.save_for_backward(slot_S)
        ctx.set_materialize_grads(False)
        w_SX = w_TPGe.reshape(t * num_ranks, g * num_experts // num_ranks).index_select(0, slot_S)
        d = x_TD.shape[1]
        rows_SX = x_TD.new_empty(len(slot_S), d + w_SX.shape[1])
        torch.index_select(x_TD, 0, plan.token_index_S, out=rows_SX[:, :d])
        rows_SX[:, d:] = w_SX
        return flight.send(rows_SX, "dispatch")

    @staticmethod
    def backward(ctx, _):
        (slot_S,), ((t, d), (_, g, num_experts)) = ctx.saved_tensors, ctx.shapes
        num_ranks, home_SX = ctx.flight.channel.size, ctx.flight.receive()
        e = num_experts // num_ranks
        home_x, home_w = home_SX.tensor_split([home_SX.shape[1] - g * e], dim=1)
        grad_x = grad_probs = None
        if ctx.needs_input_grad[0]:
            # On CPU adding rows that do not lie side by side costs more than copying them first.
            grad_x = add_rows(home_x.new_zeros(t, d), home_x.contiguous(), ctx.flight.plan)
        if ctx.needs_input_grad[1]:
            grad_w = home_w.new_zeros(t * num_ranks, g * e, dtype=ctx.dtype)
            grad_w_TPGe = grad_w.index_copy_(0, slot_S, home_w.to(ctx.dtype)).view(t, num_ranks, g, e)
            grad_probs = grad_w_TPGe.transpose(1, 2).reshape(t, g, num_experts)
        return grad_x, grad_probs, None


class _RemoteExperts(torch.autograd.Function):
    """Rows that arrive -> the local experts' sums for them ``(R, O)``, on their way home."""

    @staticmethod
    def forward(ctx, rows_RX, flight, need_x, scaling, lora_A, *lora_B):
        rows_RX, (g, e, _, d) = flight.receive(), lora_A.shape
        w_RGe = rows_RX[:, d:].unflatten(1, (g, e))
        products = choose_products(w_RGe, lora_A, lora_B)
        y_RO, kept = products.forward(rows_RX[:, :d], w_RGe, lora_A, lora_B, scaling)
        ctx.save_for_backward(rows_RX, lora_A, *lora_B, *kept)
        ctx.flight, ctx.need_x, ctx.scaling, ctx.products = flight, need_x, scaling, products
        ctx.set_materialize_grads(False)
        flight.send(y_RO, "combine")
        return y_RO

    @staticmethod
    def backward(ctx, _):
        rows_RX, lora_A, *rest = ctx.saved_tensors
        flight, products, (g, e, _, d) = ctx.flight, ctx.products, lora_A.shape
        grad_RO, lora_B, kept = flight.receive(), rest[:g], rest[g:]
        grad_RX = grad_RO.new_empty(grad_RO.shape[0], d * ctx.need_x + g * e)
        grad_x, grad_w = grad_RX.tensor_split([d * ctx.need_x], dim=1)
        found_w, grad_h = products.input_gradients(
            grad_RO, kept, lora_A, lora_B, ctx.scaling, grad_x if ctx.need_x else None
        )
        need_rows, *_, need_A = ctx.needs_input_grad[:5]
        grad_A, grad_B = None, [None] * len(lora_B)
        if need_rows:
            grad_w.copy_(found_w.flatten(1))
            flight.send(grad_RX, "dispatch_backward")
        if need_A or any(ctx.needs_input_grad[5:]):
            x_RD, weights = rows_RX[:, :d], (lora_A, lora_B, ctx.scaling)
            grad_A, grad_B = products.weight_gradients(grad_RO, x_RD, kept, grad_h, *weights)
        return None, None, None, None, grad_A, *grad_B


class _Combine(torch.autograd.Function):
    """Results that arrive are added to the projections' outputs, in place."""

    @staticmethod
    def forward(ctx, y_RO, flight, *outputs):
        index_S = flight.plan.token_index_S
        ctx.flight, ctx.dtype = flight, y_RO.dtype
        ctx.save_for_backward(index_S)
        parts = flight.receive().split([y.shape[-1] for y in outputs], dim=1)
        for y, part in zip(outputs, parts, strict=True):
            add_rows(y.view(-1, y.shape[-1]), part.to(y.dtype).contiguous(), flight.plan)
        ctx.mark_dirty(*outputs)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        if not ctx.needs_input_grad[0]:
            return None, None, *grads
        (index_S,) = ctx.saved_tensors
        out_sizes = [grad.shape[-1] for grad in grads]
        grad_SO = torch.empty(len(index_S), sum(out_sizes), dtype=ctx.dtype, device=index_S.device)
        for grad, part, o in zip(grads, grad_SO.split(out_sizes, dim=1), out_sizes, strict=True):
            torch.index_select(grad.reshape(-1, o).to(ctx.dtype), 0, index_S, out=part)
        ctx.flight.send(grad_SO, "combine_backward")
        return None, None, *grads


class RemoteExperts:
    """An input group's rows for other ranks' experts, from dispatch to combine. Collective in forward and backward.

    Made when routing is known: rows leave. Then, with the caller's own work between them: `compute`, `add_to`.

    Args:
        x_TD: Local tokens, ``(T, D)``.
        probs_TGE: Routing weights over all experts, ``(T, G, E)``; those of the own rank's experts are not used.
        plan: Who sends what where.
        channel: Group, statistics and layer.
        scaling, lora_A, lora_B: This rank's experts, as in `lora_experts`.
    """

    def __init__(
        self,
        x_TD: Tensor,
        probs_TGE: Tensor,
        plan: DispatchPlan,
        channel: Channel,
        scaling: float,
        lora_A: Tensor,
        lora_B: Sequence[Tensor],
    ) -> None:
        self._flight = _Flight(plan, channel)
        self._experts = (x_TD.requires_grad, scaling, lora_A, *lora_B)
        self._rows = _Dispatch.apply(x_TD, probs_TGE, self._flight)

    def compute(self) -> None:
        """Wait for the others' tokens, run this rank's experts on them, send the results."""
        self._rows = _RemoteExperts.apply(self._rows, self._flight, *self._experts)

    def add_to(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Wait for the results and add them to the projections' outputs.

        Args:
            outputs: Of each projection, ``(..., O_g)``, T rows in all; overwritten.
        """
        return _Combine.apply(self._rows, self._flight, *outputs)
