"""Tokens travel while the frozen projections run, forward and backward: the order of what happens on each rank.

D in_features, OUT out_features of each projection, E experts, R rank.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from ldmole_ds.distributed import (
    AllToAllTokenDispatcher,
    ExpertParallel,
    LocalTokenDispatcher,
    expert_exchange,
    expert_parallel,
)
from ldmole_ds.ops.expert_compute import SWITCH
from tests.distributed_utils import run_distributed
from tests.layers.small_group import make_group, projections
from tests.tiny import ragged_batch, tiny_model

D, E, OUT = 6, 4, {"q": 8, "k": 3, "v": 3, "o": 5}


class Noted(torch.autograd.Function):
    """The frozen product, which writes down when it runs in either direction."""

    @staticmethod
    def forward(ctx, x, weight, name, events):
        ctx.save_for_backward(weight)
        ctx.note = (name, events)
        events.append(f"{name} forward")
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        name, events = ctx.note
        events.append(f"{name} backward")
        return grad @ ctx.saved_tensors[0], None, None, None


class NotedLinear(nn.Linear):
    def forward(self, x):
        return Noted.apply(x, self.weight, self.name, self.events)


def noted_layers(members: str, topology: ExpertParallel, events: list[str]) -> list[nn.Module]:
    """Adapted layers of one group, whose frozen layers write down when they run. The same weights in every layout."""
    kind = AllToAllTokenDispatcher(topology) if topology.ep_size > 1 else LocalTokenDispatcher()
    group = make_group(tuple(members), [OUT[m] for m in members], False, topology=topology, dispatcher=kind)
    generator, local = torch.Generator().manual_seed(4), topology.local_experts(E)
    layers = projections(group)
    with torch.no_grad():
        for member, lora_B, layer in zip(members, group.lora_B, layers, strict=True):
            lora_B.copy_(torch.randn(E, *lora_B.shape[1:], generator=generator)[local.start : local.stop])
            frozen = NotedLinear(D, OUT[member], bias=False).requires_grad_(False)
            frozen.weight.copy_(torch.randn(OUT[member], D, generator=generator))
            frozen.name, frozen.events, layer.base_layer = member, events, frozen
    return layers


def run(members: str, topology: ExpertParallel, x: torch.Tensor) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What happened in order, and outputs and gradients of all local tensors."""
    events: list[str] = []

    class NotedExchange(expert_exchange.Exchange):
        def __init__(self, *args):
            super().__init__(*args)
            events.append(f"{args[-1]} leaves")

        def wait(self):
            events.append(f"{self._phase} waits")
            return super().wait()

    original, expert_exchange.Exchange = expert_exchange.Exchange, NotedExchange
    layers, x = noted_layers(members, topology, events), x.clone().requires_grad_()
    outputs = [layer(x) for layer in layers]
    sum((y * y).sum() for y in outputs).backward()
    expert_exchange.Exchange = original
    group = layers[0].group
    found = {"x": x.grad, "gate": group.gate.grad, "A": group.lora_A.grad}
    found |= {f"B{i}": b.grad for i, b in enumerate(group.lora_B)}
    return events, {**found, **{f"y{i}": y.detach() for i, y in enumerate(outputs)}}


def on_rank(rank: int, world_size: int) -> dict:
    topology, results = expert_parallel(world_size), {}
    for members in ("qkv", "o"):
        xs = torch.randn(world_size, 2, 7, D, generator=torch.Generator().manual_seed(7))
        for products in ("grouped", "dense"):
            os.environ[SWITCH] = products
            results[members, products] = run(members, topology, xs[rank])
        _, expected = run(members, ExpertParallel(), xs[rank])
        # An expert's gradient is the sum over all ranks' tokens.
        everyone = [run(members, ExpertParallel(), x)[1] for x in xs]
        held = topology.local_experts(E)
        for key in [k for k in expected if k[0] in "AB"]:
            total = sum(one[key] for one in everyone)
            expected[key] = total[:, held.start : held.stop] if key == "A" else total[held.start : held.stop]
        for products in ("grouped", "dense"):
            events, found = results[members, products]
            errors = {k: ((found[k] - v).norm() / v.norm()).item() for k, v in expected.items()}
            results[members, products] = events, errors
    del os.environ[SWITCH]
    model = tiny_model(ep_size=2).train()
    model(**ragged_batch(seed=rank)).loss.backward()
    return {"results": results, "calls": dict(model.comm_stats.calls), "groups": len(model.input_groups)}


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(on_rank, 2)


ORDER = {
    "qkv": [
        *("dispatch leaves", "q forward", "dispatch waits"),
        *("combine leaves", "k forward", "v forward", "combine waits"),
        *("combine_backward leaves", "v backward", "k backward", "combine_backward waits"),
        *("dispatch_backward leaves", "q backward", "dispatch_backward waits"),
    ],
    "o": [
        *("dispatch leaves", "o forward", "dispatch waits", "combine leaves", "combine waits"),
        *("combine_backward leaves", "combine_backward waits"),
        *("dispatch_backward leaves", "o backward", "dispatch_backward waits"),
    ],
}


@pytest.mark.distributed
@pytest.mark.parametrize("products", ["dense", "grouped"])
@pytest.mark.parametrize("members", ORDER)
def test_frozen_projections_run_while_rows_travel_in_both_directions(ranks, members, products):
    for rank in ranks:
        assert rank["results"][members, products][0] == ORDER[members]


@pytest.mark.distributed
@pytest.mark.parametrize("products", ["dense", "grouped"])
@pytest.mark.parametrize("members", ORDER)
def test_outputs_and_gradients_are_those_of_one_process(ranks, members, products):
    for rank in ranks:
        errors = rank["results"][members, products][1]
        assert len(errors) == 3 + 2 * len(members) and all(error < 2e-6 for error in errors.values()), errors


@pytest.mark.distributed
def test_a_model_runs_one_exchange_of_a_kind_per_input_group_and_direction(ranks):
    for rank in ranks:
        phases = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
        assert rank["calls"] == dict.fromkeys(phases, rank["groups"])
