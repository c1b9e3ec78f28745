"""Parameters are those that `get_ldmole_model` makes; memory and bytes are those of hand-made sums."""

import pytest
import torch

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import get_ldmole_model
from ldmole_ds.planner import Batch, Layout, Precision, Routing, shape_of
from ldmole_ds.planner.communication import communication, expert_phases
from ldmole_ds.planner.memory import memory_per_rank
from tests.families import FAMILIES
from tests.planner.plan_cases import cluster, shape

ADAPTERS = {
    "default": {},
    "no groups, own lambda MLPs": {"input_groups": "single", "lambda_sharing": "per_layer"},
    "no router": {"router": "lora"},
    "no lambda": {"router": "topk"},
    "more experts above": {"experts_per_layer": [2, 4]},
}


def meta_model(family):
    with torch.device("meta"):
        return FAMILIES[family].build()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_every_family(family):
    head = FAMILIES[family].head
    config = LDMoLEConfig(r=3, lambda_hidden_size=5, modules_to_save=None if head is None else [head])
    found = shape_of(meta_model(family), config)
    made = get_ldmole_model(meta_model(family), config)
    counted = made.num_parameters_by_kind()
    assert (found.trainable, found.frozen) == (counted["trainable"], counted["base"])
    assert found.tensors == sum(p.requires_grad for p in made.parameters())
    assert sum(found.base_tensors) == found.frozen
    for ep_size in (1, 2):
        assert tuple(map(sum, found.trainable_tensors(ep_size))) == found.held(ep_size)
    assert [g.out_features for g in found.groups] == [g.out_features for g in made.input_groups]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_parameters_of_every_kind_of_adapter(adapter):
    if adapter == "more experts above":
        config = LDMoLEConfig(**ADAPTERS[adapter], target_modules=r"model\.layers\..*_proj")
    else:
        config = LDMoLEConfig(**ADAPTERS[adapter])
    found = shape_of(meta_model("llama"), config)
    assert found.trainable == get_ldmole_model(meta_model("llama"), config).num_parameters_by_kind()["trainable"]


def test_a_head_that_is_tied_and_trained_counts_once():
    config = LDMoLEConfig(modules_to_save=["lm_head", "embed_tokens"])
    found = shape_of(meta_model("llama, tied"), config)
    counted = get_ldmole_model(meta_model("llama, tied"), config).num_parameters_by_kind()
    assert (found.trainable, found.frozen) == (counted["trainable"], counted["base"])


def test_a_module_to_save_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no module of the base model is named 'heed'"):
        shape_of(meta_model("llama"), LDMoLEConfig(modules_to_save=["heed"]))


def test_experts_held_by_a_rank():
    assert shape().trainable == 100 + 80 + 4 * 60
    assert shape().held(2) == (180, 120)
    assert shape(num_experts=3).held(2) == (180 + 180, 0), "what ep_size does not divide is replicated"


def test_memory_of_each_stage():
    def memory(stage, ep_size=2, **precision):
        layout = Layout(ep_size, stage, "tokens" if ep_size > 1 else "replicate")
        return memory_per_rank(
            shape(), layout, Batch(2, 10), 4, Precision(**precision), Routing(active_experts=4), 5000
        )

    one, two, three = memory(1), memory(2), memory(3)
    # 180 replicated over 4 ranks; 120 of experts here, over the 2 ranks that hold the same.
    owned = 180 / 4 + 120 / 2
    assert (one.base, one.adapter, one.gradients) == (1200 * 4, 300 * 4, 300 * 4)
    assert (one.masters, one.moments) == (4 * owned, 8 * owned)
    assert two.gradients == owned * 4 and two.adapter == one.adapter
    assert (three.base, three.adapter, three.gathered) == (1200, owned * 4, 1200 * 4 + 300 * 4)
    assert memory(0, 1).masters == 0 and memory(0, 1, base=2, adapter=2).masters == 4 * 420
    packed = memory(2, base=2, adapter=2, quantization="nf4").base
    assert packed == pytest.approx(1000 * (0.5 + 1 / 64 + 1 / 4096) + 200 * 2)
    assert one.total == one.base + one.adapter + one.gradients + one.masters + one.moments + 5000 + one.dispatch


def test_dispatch_buffers_expected_and_worst():
    def dispatch(layout, accumulation=1, **routing):
        found = memory_per_rank(
            shape(), layout, Batch(2, 10, accumulation), 4, Precision(), Routing(**{"active_experts": 4, **routing}), 0
        )
        return found.dispatch, found.worst_dispatch

    # Per row: 10 inputs, and for 2 projections x 1 local expert twice the weight and h of rank 2. In flight: 10 + 10.
    elsewhere = 20 * 2 * 3 * (1 + 2)
    expected, worst = dispatch(Layout(4, 2, "tokens"), remote_ranks=1.5)
    assert expected == 4 * (30 * (10 + 2 * (2 + 2)) - elsewhere + 30 * 20)
    assert worst == 4 * (60 * (10 + 2 * (2 + 2)) - elsewhere + 60 * 20)
    _, bounded = dispatch(Layout(4, 2, "tokens", chunk_tokens=5), remote_ranks=1.5)
    assert bounded == 4 * (15 * (10 + 2 * (2 + 2)) - elsewhere + 15 * 20)
    assert dispatch(Layout(4, 2, "weights")) == (2 * 4 * 240, 2 * 4 * 240)
    assert dispatch(Layout(4, 2, "weights"), accumulation=2) == (3 * 4 * 240, 3 * 4 * 240)
    assert dispatch(Layout()) == (0, 0)


def test_bytes_of_dispatch_by_hand():
    layout, batch = Layout(4, 2, "tokens"), Batch(2, 10, accumulation=3)
    found = expert_phases(shape(), layout, batch, 4, [(30, 25)], first_has_gradient=True)
    assert (found["dispatch"].calls, found["dispatch"].bytes) == (3, 3 * 30 * (10 + 2) * 4)
    assert found["combine"].bytes == 3 * 25 * 10 * 4 and found["combine_backward"].bytes == 3 * 30 * 10 * 4
    assert found["dispatch_backward"].bytes == 3 * 25 * 12 * 4
    assert found["counts"].bytes == 3 * 3 * 16
    behind = expert_phases(shape(), layout, batch, 4, [(30, 25)])
    assert behind["dispatch_backward"].bytes == 3 * 25 * 2 * 4, "no gradient for a frozen embedding"


def test_zero_moves_what_rings_move():
    found = communication(
        shape(), Layout(2, 2, "weights"), Batch(2, 10, 2), cluster(2, 2), Precision(), Routing(active_experts=4)
    )
    # Stage 2 reduces in each of two micro-steps; an all-reduce is two rings; 180 values over 4 ranks, 120 over 2.
    assert found["reduce_dense"].bytes == 2 * 2 * 180 * 4 * 3 / 4
    assert found["reduce_experts"].bytes == 2 * 2 * 120 * 4 * 1 / 2
    assert found["update_dense"].bytes == 180 * 4 * 3 / 4
    # The twins sit on different nodes, one per node: one wire of 1e8 bytes per second, one hop of 1e-5 s.
    assert found["reduce_experts"].seconds == pytest.approx(4 * 1e-5 + 960 / 1e8)
    assert found["gather"].bytes == 120 * 4 and found["reduce_scatter"].bytes == 2 * 120 * 4


def test_links_inside_and_between_nodes():
    near, far = cluster(2, 4).exchange_link(4), cluster(2, 4).exchange_link(8)
    assert near.latency == pytest.approx(3e-6) and near.bandwidth == pytest.approx(1e9)
    # 3 near peers, 4 far ones.
    assert far.latency == pytest.approx(3e-6 + 4e-5)
    assert far.bandwidth == pytest.approx(1 / (3 / 7 / 1e9 + 4 / 7 / 1e8))
    ring = cluster(2, 4).ring_link(8, 1)
    assert ring.latency == pytest.approx(3e-5) and ring.bandwidth == pytest.approx(4e8)
