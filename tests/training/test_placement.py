"""Expert-parallel groups stay on one host where they can, and the table says where everyone is."""

from types import SimpleNamespace

import pytest
from transformers.integrations import HfDeepSpeedConfig

from ldmole_ds.distributed.topology import ExpertParallel
from ldmole_ds.training.placement import Place, fits_in_nodes, gather_places, placement_table
from ldmole_ds.training.setup import may_partition, resolve_ep_size


def nodes(*sizes: int) -> list[Place]:
    """Ranks in order over nodes with so many ranks each."""
    return [Place(f"node{n}", "boot", local) for n, size in enumerate(sizes) for local in range(size)]


@pytest.mark.parametrize(
    ("experts", "places", "expected"),
    [
        (8, nodes(8, 8), 8),
        (8, nodes(6, 6), 2),  # 3 divides the ranks of a node, but not the experts
        (1, nodes(4), 1),
        (6, nodes(4), 2),
        (8, nodes(4, 2, 2), 2),  # uneven nodes
        (8, nodes(3, 1), 1),
        (8, nodes(1, 1), 1),
        (8, [Place(f"node{i % 2}", "boot", i // 2) for i in range(4)], 1),  # ranks dealt out round-robin
        (8, [Place("same-name", f"boot{i // 2}", i % 2) for i in range(4)], 2),
    ],
)
def test_auto_is_the_largest_that_keeps_each_group_on_one_host(experts, places, expected):
    ep_size = resolve_ep_size("auto", experts, places)
    assert ep_size == expected and fits_in_nodes(ep_size, places)


def test_numbers_are_checked():
    assert resolve_ep_size("4", 8, nodes(2, 2)) == 4  # across nodes if the user says so
    with pytest.raises(ValueError, match="--num_experts 8 is not divisible by --ep_size 3"):
        resolve_ep_size("3", 8, nodes(3))
    with pytest.raises(ValueError, match="does not divide the 4 ranks"):
        resolve_ep_size("3", 6, nodes(4))


def test_the_table():
    table = placement_table(nodes(2, 2), ExpertParallel(ep_size=2, world_size=4), 8).splitlines()
    assert table[0] == "placement 4 ranks on 2 nodes, EP groups lie inside nodes"
    assert [line.split() for line in table[1:]] == [
        ["node", "local", "rank", "rank", "experts"],
        ["node0", "0", "0", "0-3"],
        ["node0", "1", "1", "4-7"],
        ["node1", "0", "2", "0-3"],
        ["node1", "1", "3", "4-7"],
    ]
    across = placement_table(nodes(2, 2), ExpertParallel(ep_size=4, world_size=4), 4)
    assert "EP groups span nodes: tokens cross the network" in across and across.split()[-1] == "3"
    replicated = placement_table(nodes(2), ExpertParallel(world_size=2), 8).splitlines()
    assert replicated[0] == "placement 2 ranks on 1 node" and all(line.endswith("0-7") for line in replicated[2:])


def test_a_long_table_is_abbreviated():
    table = placement_table(nodes(*[8] * 8), ExpertParallel(ep_size=8, world_size=64), 8).splitlines()
    assert len(table) == 2 + 8 + 1 + 4
    assert "52 more" in table[10] and table[-1].split() == ["node7", "7", "63", "7"]


def test_a_process_alone_is_on_one_host():
    (place,) = gather_places()
    assert place.host and place.local_rank == 0 and resolve_ep_size("auto", 8, [place]) == 1


@pytest.mark.parametrize(("stage", "partitioned"), [(None, False), (0, False), (1, True), (2, True), (3, True)])
def test_auto_partitions_where_the_engine_can(stage, partitioned):
    config = HfDeepSpeedConfig({"zero_optimization": {} if stage is None else {"stage": stage}})
    assert may_partition(SimpleNamespace(deepspeed="some.json", hf_deepspeed_config=config)) == partitioned
    assert not may_partition(SimpleNamespace(deepspeed=None))
