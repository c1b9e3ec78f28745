"""One adapted layer under the layouts that a job can choose, with the gradient synchronisation that each brings.

    ep 1, ZeRO-2    all experts on every rank; their gradients are reduce-scattered, updated parameters all-gathered
    ep 1, ZeRO-3    parameters all-gathered for forward and again for backward, gradients reduce-scattered
    weights         each rank holds E/P experts; gathered for forward and backward, gradients reduce-scattered
    tokens          each rank holds E/P experts; tokens travel

Ranks are one EP group, so partitioned experts have one home and no gradients to average. The optimizer is left out: it
updates the same share of the experts on each rank in all four; so are the gradients of router and lambda MLP, which
every rank has in all four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from expert_layers import Formulation, Sizes, Weights, ours
from torch import Tensor, nn

from ldmole_ds.distributed import ExpertParallel

ZERO2, ZERO3, WEIGHTS, TOKENS = "ep 1, ZeRO-2", "ep 1, ZeRO-3", "weights", "tokens"


@dataclass(frozen=True)
class LayoutStep:
    """One training step without the optimizer, and what the rank holds of the experts between steps, bytes."""

    run: Callable[[], object]
    held: int


def layout_step(name: str, weights: Weights, sizes: Sizes, topology: ExpertParallel, **router: object) -> LayoutStep:
    """The step of this layout on this rank; ``router`` as in `ours`."""
    if name in (WEIGHTS, TOKENS):
        layer = ours(weights, sizes, topology, name, **router)
        return LayoutStep(lambda: layer.step(weights.x, weights.cotangent), _bytes(layer))
    alone = ExpertParallel(world_size=topology.world_size, rank=topology.rank)
    layer = ours(weights, sizes, alone, "tokens", **router)
    experts = list(layer.experts)
    if name == ZERO2:
        return LayoutStep(lambda: _zero2_step(layer, experts, weights, topology.rank), _bytes(layer))
    shard = _flat([p.data for p in experts]).chunk(topology.world_size)[topology.rank].clone()
    release(experts)
    return LayoutStep(lambda: _zero3_step(layer, experts, shard, weights), shard.nbytes)


def release(params: list[nn.Parameter]) -> None:
    """What ZeRO-3 does with parameters that are not in use; their shapes are kept."""
    for param in params:
        param.whole = getattr(param, "whole", param.shape)
        param.data = param.new_empty(0)


def _bytes(layer: Formulation) -> int:
    return sum(p.nbytes for p in layer.experts)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _reduce_scatter(params: list[nn.Parameter]) -> Tensor:
    flat = _flat([p.grad for p in params])
    parts = list(flat.chunk(dist.get_world_size()))
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts)
    return out


def _all_gather(shard: Tensor) -> Tensor:
    whole = shard.new_empty(dist.get_world_size(), shard.numel())
    dist.all_gather(list(whole.unbind(0)), shard)
    return whole.view(-1)


def _zero2_step(layer: Formulation, experts: list[nn.Parameter], weights: Weights, rank: int) -> None:
    layer.step(weights.x, weights.cotangent)
    _reduce_scatter(experts)
    for param in experts:
        param.grad = None
    flat = _flat([p.data for p in experts])
    _fill(experts, _all_gather(flat.chunk(dist.get_world_size())[rank]))


def _zero3_step(layer: Formulation, experts: list[nn.Parameter], shard: Tensor, weights: Weights) -> None:
    for param in layer.parameters:
        param.grad = None
    x = weights.x.detach().requires_grad_()
    _place(experts, _all_gather(shard))
    y = layer.forward(x)
    _place(experts, _all_gather(shard))
    y.backward(weights.cotangent)
    _reduce_scatter(experts)
    for param in experts:
        param.grad = None
    release(experts)


def _fill(params: list[nn.Parameter], flat: Tensor) -> None:
    for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.data.copy_(part.view_as(param))


def _place(params: list[nn.Parameter], flat: Tensor) -> None:
    shapes = [p.whole for p in params]
    for param, part, shape in zip(params, flat.split([s.numel() for s in shapes]), shapes, strict=True):
        param.data = part.view(shape)
