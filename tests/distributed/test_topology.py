"""Which rank holds what. One process plays each rank in turn, over a backend that only pretends to communicate."""

from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ldmole_ds.distributed import (
    AllToAllTokenDispatcher,
    CommStats,
    ExpertParallel,
    LocalTokenDispatcher,
    WeightGatherDispatcher,
    build_dispatcher,
    expert_parallel,
)
from ldmole_ds.model import get_ldmole_model
from tests.tiny import tiny_config, tiny_llama


@contextmanager
def playing(rank, world_size):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def layout(rank, world_size, ep_size, num_experts=8):
    """EP group, EDP group and experts of a rank."""
    with playing(rank, world_size):
        topology = expert_parallel(ep_size)
        assert (topology.rank, topology.world_size, topology.ep_size) == (rank, world_size, ep_size)
        groups = [dist.get_process_group_ranks(group) for group in (topology.ep_group, topology.edp_group)]
        return (*groups, list(topology.local_experts(num_experts)))


def test_the_worked_example_of_the_module_docstring():
    low, high = [0, 1, 2, 3], [4, 5, 6, 7]
    assert layout(0, 4, 2) == ([0, 1], [0, 2], low)
    assert layout(1, 4, 2) == ([0, 1], [1, 3], high)
    assert layout(2, 4, 2) == ([2, 3], [0, 2], low)
    assert layout(3, 4, 2) == ([2, 3], [1, 3], high)


@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 2), (4, 4), (6, 2), (6, 3), (8, 4)])
def test_groups_partition_the_ranks_and_the_experts(world_size, ep_size):
    layouts = [layout(rank, world_size, ep_size, num_experts=12) for rank in range(world_size)]
    for rank, (ep_group, edp_group, experts) in enumerate(layouts):
        assert len(ep_group) == ep_size and len(edp_group) == world_size // ep_size
        assert rank in ep_group and rank in edp_group
        # An EP group holds every expert once, in the order of its ranks; an EDP group holds the same ones.
        assert [expert for peer in ep_group for expert in layouts[peer][2]] == list(range(12))
        assert all(layouts[peer][2] == experts for peer in edp_group)


def test_a_single_rank_needs_no_process_group():
    topology = expert_parallel(1)
    assert topology == ExpertParallel() and topology.local_experts(8) == range(8)
    with pytest.raises(RuntimeError, match="ep_size=2 needs an initialised process group: start with `deepspeed"):
        expert_parallel(2)


def test_without_expert_parallelism_the_world_is_still_known():
    with playing(2, 4):
        topology = expert_parallel(1)
    assert (topology.rank, topology.world_size, topology.ep_group) == (2, 4, None)
    assert not topology.partitions(8)


@pytest.mark.parametrize("bad", [0, -1, 2.0, "2", None])
def test_a_bad_ep_size(bad):
    with pytest.raises(ValueError, match="ep_size must be a whole number of at least 1"):
        expert_parallel(bad)


@pytest.mark.parametrize("ep_size", [4, 5, 12])
def test_an_ep_size_that_does_not_divide_the_ranks_lists_those_that_do(ep_size):
    with playing(0, 6), pytest.raises(ValueError, match=rf"ep_size={ep_size} does not divide .*\[1, 2, 3, 6\]"):
        expert_parallel(ep_size)


def test_an_ep_size_that_does_not_divide_the_experts_lists_those_that_do():
    with playing(0, 3), pytest.raises(ValueError, match=r"num_experts=8 is not divisible by ep_size=3.*\[1, 2, 4, 8\]"):
        get_ldmole_model(tiny_llama(), tiny_config(), ep_size=3)


def test_the_dispatcher_of_a_layer():
    whole, split, stats = ExpertParallel(), ExpertParallel(2, 1), CommStats()
    for topology, num_experts, name, expected in (
        (whole, 8, "tokens", LocalTokenDispatcher),
        (split, 8, "tokens", AllToAllTokenDispatcher),
        (split, 8, "weights", WeightGatherDispatcher),
        (split, 7, "tokens", LocalTokenDispatcher),  # replicated on both ranks
    ):
        dispatcher = build_dispatcher(topology, num_experts, name, stats)
        assert type(dispatcher) is expected and dispatcher.stats is stats
    assert split.local_experts(7) == range(7) and split.local_experts(8) == range(4, 8)
    with pytest.raises(ValueError, match="expert_dispatch='experts' is not known: use one of tokens, weights"):
        build_dispatcher(split, 8, "experts", stats)
