"""Dispatch, expert products and combine as one autograd function, so that waiting overlaps with work.

    forward    send remote tokens | own tokens through own experts | remote tokens through own experts, results home
    backward   send remote gradients | own tokens' gradients | remote tokens' gradients, home

Each bar is a point where the exchange has been started and is waited for only after the work beside it. The backward
of dispatch is combine and the other way round: gradients of results travel the way the tokens went, gradients of
tokens and routing weights the way the results came. Shape legend: `ldmole_ds.distributed.dispatch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_ds.distributed.all_to_all import Channel, Exchange
from ldmole_ds.ops.lora_experts import experts_backward, experts_forward


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


class _ExchangeExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_TGE, plan, channel, scaling, lora_A, *lora_B):
        num_ranks = channel.size
        (t, d), (_, g, num_experts) = x_TD.shape, w_TGE.shape
        w_TPGe = w_TGE.view(t, g, num_ranks, num_experts // num_ranks).transpose(1, 2)
        w_own = w_TPGe[:, plan.own_rank]
        w_S = w_TPGe[plan.token_index_S, plan.destination_S].flatten(1)
        rows_SX = torch.cat([x_TD.index_select(0, plan.token_index_S), w_S], dim=1)
        dispatch = Exchange(rows_SX, plan.output_splits, plan.input_splits, channel, "dispatch")
        y_TO, h_own = experts_forward(x_TD, w_own, lora_A, lora_B, scaling)
        x_RD, w_R = dispatch.wait().split([d, w_S.shape[1]], dim=1)
        w_RGe = w_R.reshape(-1, g, num_experts // num_ranks)
        y_RO, h_remote = experts_forward(x_RD, w_RGe, lora_A, lora_B, scaling)
        combine = Exchange(y_RO, plan.input_splits, plan.output_splits, channel, "combine")
        y_TO.index_add_(0, plan.token_index_S, combine.wait())
        ctx.save_for_backward(x_TD, w_own, h_own, x_RD, w_RGe, h_remote, lora_A, *lora_B)
        ctx.plan, ctx.channel, ctx.scaling, ctx.num_ranks = plan, channel, scaling, num_ranks
        return y_TO

    @staticmethod
    def backward(ctx, grad_TO):
        x_TD, w_own, h_own, x_RD, w_RGe, h_remote, lora_A, *lora_B = ctx.saved_tensors
        plan, channel = ctx.plan, ctx.channel
        need_x, (_, g, e) = ctx.needs_input_grad[0], w_own.shape
        need = {"need_x": need_x, "need_weights": any(ctx.needs_input_grad[5:])}
        grad_SO = grad_TO.index_select(0, plan.token_index_S)
        combine = Exchange(grad_SO, plan.output_splits, plan.input_splits, channel, "combine_backward")
        grad_x, grad_w, grad_A, grad_B = experts_backward(
            grad_TO, x_TD, w_own, h_own, lora_A, lora_B, ctx.scaling, **need
        )
        remote_x, remote_w, remote_A, remote_B = experts_backward(
            combine.wait(), x_RD, w_RGe, h_remote, lora_A, lora_B, ctx.scaling, **need
        )
        remote_w = remote_w.flatten(1)
        grad_RX = torch.cat([remote_x, remote_w], dim=1) if need_x else remote_w
        dispatch = Exchange(grad_RX, plan.input_splits, plan.output_splits, channel, "dispatch_backward")
        if need["need_weights"]:
            grad_A.add_(remote_A)
            for own, remote in zip(grad_B, remote_B, strict=True):
                own.add_(remote)
        grad_w_TPGe = grad_w.new_zeros(x_TD.shape[0], ctx.num_ranks, g, e)
        grad_w_TPGe[:, plan.own_rank] = grad_w
        home_SX = dispatch.wait()
        if need_x:
            home_x, home_w = home_SX.split([x_TD.shape[1], g * e], dim=1)
            grad_x.index_add_(0, plan.token_index_S, home_x)
        else:
            home_w = home_SX
        grad_w_TPGe[plan.token_index_S, plan.destination_S] = home_w.reshape(-1, g, e)
        grad_w_TGE = grad_w_TPGe.transpose(1, 2).reshape(x_TD.shape[0], g, ctx.num_ranks * e)
        return grad_x, grad_w_TGE, None, None, None, grad_A, *grad_B


def exchange_experts(
    x_TD: Tensor,
    w_TGE: Tensor,
    plan: DispatchPlan,
    channel: Channel,
    scaling: float,
    lora_A: Tensor,
    *lora_B: Tensor,
) -> Tensor:
    """Sum over all experts of the EP group for each local token.

    Args:
        x_TD: Local tokens, ``(T, D)``.
        w_TGE: Routing weights over all experts, ``(T, G, E)``, dtype of ``x_TD``.
        plan: Who sends what where.
        channel: Group, statistics and layer.
        scaling, lora_A, lora_B: This rank's experts, as in `lora_experts`.

    Returns:
        ``(T, O)``. Collective in forward and backward.
    """
    return _ExchangeExperts.apply(x_TD, w_TGE, plan, channel, scaling, lora_A, *lora_B)
