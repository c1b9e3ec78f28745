"""Weights kept between micro-steps, tokens dispatched in chunks, and the choice between tokens and weights."""

from __future__ import annotations

import pytest
import torch

from ldmole_ds.distributed import AllToAllTokenDispatcher, ExpertWeights, expert_parallel
from ldmole_ds.distributed.dispatch_choice import Workload, choose_dispatch, remote_ranks
from ldmole_ds.distributed.link import Link, latency_and_bandwidth
from ldmole_ds.model import get_ldmole_model
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

SIZES = {"ep_size": 2, "num_experts": 8, "r": 8, "in_features": 576, "out_features": [576, 192, 192]}


# ---- weights kept between micro-steps ----


def accumulate(rank: int, world_size: int) -> dict:
    """Collectives of one optimizer step of four micro-steps, and logits before and after weights change."""
    model = tiny_model(ep_size=2, expert_dispatch="weights").train()
    calls, batch = model.comm_stats.calls, ragged_batch(rows=2, seed=rank)
    for _ in range(4):
        model(**batch, gradient_accumulation_steps=4).loss.backward()
    counted = {phase: calls[phase] for phase in ("gather", "reduce_scatter")}
    before = model(**batch, gradient_accumulation_steps=4).logits.detach()
    if rank == 1:  # the other rank's weights stay: it must gather anew all the same
        with torch.no_grad():
            model.input_groups[0].lora_B[0].add_(0.5)
    kept = model(**batch, gradient_accumulation_steps=4).logits.detach()
    fresh = model(**batch).logits.detach()
    return {"calls": counted, "before": before, "kept": kept, "fresh": fresh, "groups": len(model.input_groups)}


@pytest.mark.distributed
def test_weights_are_gathered_once_per_optimizer_step_and_again_when_any_rank_changed_them():
    for result in run_distributed(accumulate, 2):
        assert result["calls"] == {"gather": result["groups"], "reduce_scatter": 4 * result["groups"]}
        assert torch.equal(result["kept"], result["fresh"])
        assert not torch.equal(result["kept"], result["before"])


# ---- tokens in chunks ----

TOKENS, D, OUT = 96, 16, 24


def kept_for_backward(rank: int, world_size: int, chunk_tokens: int) -> int:
    """Bytes that rank 0, to which every token goes, keeps for backward."""
    topology = expert_parallel(2)
    torch.manual_seed(rank)
    probs = torch.zeros(TOKENS, 1, 2)
    probs[..., 0] = 1.0
    leaves = [torch.randn(TOKENS, D), torch.randn(1, 1, 4, D), torch.randn(1, 4, OUT)]
    x, lora_A, lora_B = (t.requires_grad_() for t in leaves)
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    dispatcher = AllToAllTokenDispatcher(topology, chunk_tokens=chunk_tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = dispatcher.run(x, probs.requires_grad_(), ExpertWeights(lora_A, [lora_B], 1.0), "layer")
    y.sum().backward()
    return sum(sizes.values())


def memory_of_both(rank: int, world_size: int) -> tuple[int, int]:
    return kept_for_backward(rank, world_size, 0), kept_for_backward(rank, world_size, 8)


@pytest.mark.distributed
def test_chunks_do_not_keep_what_other_ranks_sent():
    (whole, chunked), _ = run_distributed(memory_of_both, 2)
    remote_tokens = TOKENS * D * 4
    assert whole - chunked >= remote_tokens


# ---- auto ----


def test_a_slow_moment_of_the_machine_makes_no_link_endlessly_fast():
    """Rounds in which a tiny exchange took longer than a large one."""
    noisy = latency_and_bandwidth([5e-3, 6e-3, 5e-3], [4e-3, 5e-3, 4e-3], sent=4e6)
    assert noisy == (5e-3, pytest.approx(4e6 / 0.4e-3))
    busy = latency_and_bandwidth([1e-3, 9e-3, 1e-3], [5e-3, 13e-3, 5e-3], sent=4e6)
    assert busy == (1e-3, pytest.approx(1e9))


def test_more_tokens_favour_weights_and_more_experts_favour_tokens():
    link = Link(latency=50e-6, bandwidth=1e9)
    few = choose_dispatch(Workload(tokens=8, active_experts=2), link, **SIZES)
    many = choose_dispatch(Workload(tokens=4096, active_experts=2), link, **SIZES)
    large = choose_dispatch(Workload(tokens=64, active_experts=2), link, **{**SIZES, "num_experts": 256, "r": 64})
    assert (few.mode, many.mode, large.mode) == ("tokens", "weights", "tokens")


def test_a_slow_start_of_collectives_favours_the_one_with_fewer():
    workload = Workload(tokens=20, active_experts=2)
    fast, slow = (choose_dispatch(workload, Link(latency, 1e9), **SIZES) for latency in (0.0, 1e-3))
    assert fast.mode == "tokens" and slow.mode == "weights"


def test_tokens_that_visit_few_ranks_meet_fewer_experts():
    """On 8 ranks with 2 of 8 experts in use a token meets about 2 experts instead of 8."""
    sizes = {**SIZES, "ep_size": 8, "out_features": [576]}
    workload = Workload(tokens=4096, active_experts=2)
    link, slow = Link(50e-6, 1e9), Link(50e-6, 1e9, flops=1e9)
    assert (choose_dispatch(workload, link, **sizes).mode, choose_dispatch(workload, slow, **sizes).mode) == (
        "weights",
        "tokens",
    )
    same = choose_dispatch(workload, slow, **{**sizes, "ep_size": 2, "num_experts": 64, "out_features": [576] * 3})
    without = choose_dispatch(workload, link, **{**sizes, "ep_size": 2, "num_experts": 64, "out_features": [576] * 3})
    products = 6 * 4096 * 64 * 8 * (3 * 576 + 3 * 576) / 1e9
    assert same.weights_seconds - without.weights_seconds == pytest.approx(products)


def test_grouped_products_weigh_as_much_in_either():
    """Large experts, few of them active: dense products favour tokens, grouped ones let the link decide."""
    sizes = {**SIZES, "ep_size": 2, "num_experts": 64, "r": 32, "out_features": [576]}
    workload = Workload(tokens=4096, active_experts=2)
    dense = choose_dispatch(workload, Link(50e-6, 1e9, flops=3e10), **sizes)
    grouped = choose_dispatch(workload, Link(50e-6, 1e9, flops=3e10, grouped_flops=3e10), **sizes)
    assert grouped.tokens_seconds < dense.tokens_seconds / 2 and grouped.weights_seconds < dense.weights_seconds / 2
    assert (dense.mode, grouped.mode) == ("tokens", "weights")
    paper = [choose_dispatch(workload, Link(50e-6, 1e9, 3e10, g), **SIZES).tokens_seconds for g in (0.0, 3e10)]
    assert paper[0] == paper[1]


def test_bytes_are_those_of_the_formula():
    choice = choose_dispatch(Workload(tokens=10, active_experts=8, accumulation_steps=2), Link(0.0, 1e6), **SIZES)
    assert choice.tokens_bytes == 2 * 10 * 1 * (576 + 3 * 4 + 960) * 4 + 2 * 8
    assert choice.weights_bytes == 1.5 * 4 * 8 * (3 * 576 + 960) * 4
    assert choice.tokens_seconds == pytest.approx(choice.tokens_bytes / 1e6)


def test_expected_remote_ranks():
    assert remote_ranks(2, 8, 1, 8) == 1.0
    assert remote_ranks(4, 4, 1, 1) == pytest.approx(3 * 0.25)
    assert remote_ranks(8, 8, 3, 2) == pytest.approx(7 * (1 - 0.75**3))


def auto_model(rank: int, world_size: int) -> tuple[list[str], str, torch.Tensor]:
    torch.manual_seed(rank)
    model = get_ldmole_model(tiny_llama(), tiny_config(), ep_size=2, expert_dispatch="auto", tokens_per_rank=16)
    with torch.no_grad():
        logits = model.eval()(**ragged_batch()).logits
    return [type(group.dispatcher).__name__ for group in model.input_groups], model.expert_dispatch, logits


@pytest.mark.distributed
def test_all_ranks_choose_alike_and_say_why():
    (modes, text, logits), (other_modes, other_text, other_logits) = run_distributed(auto_model, 2)
    assert modes == other_modes and text == other_text
    assert "auto: tokens for" in text and "GB/s" in text
    assert torch.equal(logits, other_logits)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="use one of tokens, weights, auto"):
        get_ldmole_model(tiny_llama(), tiny_config(), expert_dispatch="experts")
    with pytest.raises(ValueError, match="dispatch_chunk_tokens must be 0 or more"):
        get_ldmole_model(tiny_llama(), tiny_config(), dispatch_chunk_tokens=-1)


def test_auto_without_partitioned_experts_moves_nothing():
    model = get_ldmole_model(tiny_llama(), tiny_config(), expert_dispatch="auto")
    assert model.expert_dispatch == "auto: no experts are partitioned, so nothing moves"
