"""An input group whose tokens travel: frozen layers and own experts run while rows are on their way.

    tokens leave | W of the first members | remote experts, results leave | W of the others, own experts | add

and backward in the opposite order (`ldmole_ds.distributed.expert_exchange`).

Shape legend: T tokens, D in_features, G members, E experts, O_g out_features.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldmole_ds.distributed import ExpertWeights
from ldmole_ds.distributed.dispatch import expert_updates
from ldmole_ds.distributed.expert_exchange import RemoteExperts
from ldmole_ds.ops.autocast import without_autocast
from ldmole_ds.ops.frozen_product import frozen_linear

if TYPE_CHECKING:
    from ldmole_ds.layers.input_group import InputGroup


def overlapped_group(
    group: InputGroup, x: Tensor, x_TD: Tensor, probs_TGE: Tensor, experts: ExpertWeights, remote: RemoteExperts
) -> list[Tensor]:
    """``W_g x`` and the update for all members, ``(..., D) -> G times (..., O_g)``.

    Args:
        group: Whose members these are.
        x: What the frozen layers read.
        x_TD: What the experts read: the same tokens, after dropout, in the experts' dtype.
        probs_TGE: Routing weights over all experts.
        experts: Those of this rank.
        remote: The exchange, in which tokens have left.
    """
    # About half of the frozen layers' work for each way; the first way of a group of one.
    done = list(itertools.accumulate(group.out_features))
    first = 1 + sum(2 * o < done[-1] for o in done[:-1])
    outputs = [frozen_linear(layer.base_layer, x) for layer in group.layers[:first]]
    with without_autocast(x):
        remote.compute()
    outputs += [frozen_linear(layer.base_layer, x) for layer in group.layers[first:]]
    dtype = experts.lora_A.dtype
    with without_autocast(x):
        own = expert_updates(x_TD, group.dispatcher.own(probs_TGE).to(dtype), experts)
        # Experts in float32 beside a half-precision base are summed before they are rounded.
        totals = [
            layer.add(update, y) if y.dtype == dtype else update.add_to(torch.zeros_like(y, dtype=dtype), True)
            for layer, update, y in zip(group.layers, own, outputs, strict=True)
        ]
        totals = remote.add_to(totals)
        return [t if y.dtype == dtype else y + t.to(y.dtype) for t, y in zip(totals, outputs, strict=True)]
