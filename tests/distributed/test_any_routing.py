"""Random routings, drawn alike on all ranks, through every dispatcher: outputs and gradients of one process.

Every rank draws for itself whether its experts' products are dense or grouped; those of one process are dense.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmole_ds.distributed import (
    AllToAllTokenDispatcher,
    ExpertWeights,
    LocalTokenDispatcher,
    WeightGatherDispatcher,
    expert_parallel,
)
from ldmole_ds.ops.expert_compute import SWITCH
from tests.distributed_utils import run_distributed

EXAMPLES = 40


@st.composite
def routings(draw):
    """Sizes, tokens of each of four ranks (most of them few, often none), and how experts are chosen."""
    return {
        "tokens": draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 11]), min_size=4, max_size=4)),
        "experts": draw(st.sampled_from([2, 4, 8])),
        "projections": draw(st.integers(1, 3)),
        "rank": draw(st.integers(1, 4)),
        "density": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "only": draw(st.sampled_from([None, 0, 1])),
        "chunk": draw(st.integers(1, 6)),
        "seed": draw(st.integers(0, 2**16)),
    }


def data_of(routing: dict, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, routing weights and cotangent of a rank; the weights may leave tokens without any expert."""
    generator = torch.Generator().manual_seed(routing["seed"] * 10 + rank)
    t, g, e = routing["tokens"][rank], routing["projections"], routing["experts"]
    weights = torch.rand(t, g, e, generator=generator, dtype=torch.float64) + 0.1
    weights *= torch.rand(t, g, e, generator=generator) < routing["density"]
    if routing["only"] is not None:
        weights *= torch.nn.functional.one_hot(torch.tensor(routing["only"]), e)
    x = torch.randn(t, 5, generator=generator, dtype=torch.float64)
    return x, weights, torch.randn(t, 3 * g, generator=generator, dtype=torch.float64)


def all_experts(routing: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(routing["seed"])
    g, e, r = routing["projections"], routing["experts"], routing["rank"]
    lora_A = torch.randn(g, e, r, 5, generator=generator, dtype=torch.float64)
    return lora_A, [torch.randn(e, r, 3, generator=generator, dtype=torch.float64) for _ in range(g)]


def gradients(dispatcher, data, lora_A, lora_B) -> list[torch.Tensor]:
    x, weights, cotangent = data
    active = weights != 0
    leaves = [t.clone().requires_grad_() for t in (x, weights, lora_A, *lora_B)]
    y = dispatcher.run(leaves[0], leaves[1], ExpertWeights(leaves[2], leaves[3:], 0.7), "layer")
    y.backward(cotangent)
    x_grad, weight_grad, *rest = [leaf.grad for leaf in leaves]
    return [y.detach(), x_grad, weight_grad * active, *rest]


def worst_errors(rank: int, world_size: int) -> dict[str, float]:
    """Largest error of each dispatcher over all examples. Raises nothing in between: ranks must stay together."""
    topologies = {p: expert_parallel(p) for p in (2, 4)}
    worst: dict[str, float] = {}

    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)
    @given(routings())
    def example(routing):
        topology = topologies[2 if routing["experts"] == 2 else 4]
        os.environ[SWITCH] = "dense"
        first = rank - topology.ep_rank
        held = topology.local_experts(routing["experts"])
        lora_A, lora_B = all_experts(routing)
        peers = range(first, first + topology.ep_size)
        whole = [gradients(LocalTokenDispatcher(), data_of(routing, peer), lora_A, lora_B) for peer in peers]
        own = whole[topology.ep_rank]
        summed = [sum(tensors) for tensors in zip(*(grads[3:] for grads in whole), strict=True)]
        expected = [*own[:3], summed[0][:, held], *(b[held] for b in summed[1:])]
        dispatchers = {
            "tokens": AllToAllTokenDispatcher(topology),
            "chunks": AllToAllTokenDispatcher(topology, chunk_tokens=routing["chunk"]),
            "weights": WeightGatherDispatcher(topology),
        }
        draw = random.Random(routing["seed"] * 4 + rank)
        for name, dispatcher in dispatchers.items():
            os.environ[SWITCH] = draw.choice(["dense", "grouped"])
            found = gradients(dispatcher, data_of(routing, rank), lora_A[:, held], [b[held] for b in lora_B])
            errors = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True) if b.numel()]
            worst[name] = max([worst.get(name, 0.0), *errors])

    example()
    del os.environ[SWITCH]
    return worst


@pytest.mark.distributed
def test_random_routings_equal_one_process():
    for worst in run_distributed(worst_errors, 4, timeout_s=300):
        assert worst.keys() == {"tokens", "chunks", "weights"}
        assert all(error < 1e-11 for error in worst.values()), worst
