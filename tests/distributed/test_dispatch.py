"""Dispatchers over real ranks against one process that holds all experts: outputs, gradients, and bytes moved.

Shapes and letters: `dispatch_cases`.
Everything is float64, so that another order of summation cannot hide a lost token.
"""

from __future__ import annotations

import functools

import pytest

from ldmole_ds.distributed import (
    AllToAllTokenDispatcher,
    ExpertWeights,
    LocalTokenDispatcher,
    ReferenceTokenDispatcher,
    WeightGatherDispatcher,
    expert_parallel,
)
from tests.distributed.dispatch_cases import CASES, OUT, Case, D, E, G, R, all_data, expected_bytes
from tests.distributed_utils import run_distributed

SCALING = 1.5
LAYER = "model.layers.0.self_attn.{q_proj,k_proj}"
DISPATCHERS = {
    "tokens": AllToAllTokenDispatcher,
    "reference": ReferenceTokenDispatcher,
    "weights": WeightGatherDispatcher,
    "tokens, two at a time": functools.partial(AllToAllTokenDispatcher, chunk_tokens=2),
}


def run_one(dispatcher, x, probs, lora_A, lora_B, cotangent, x_needs_grad=True) -> dict:
    """Output and gradients of one rank.

    A zero weight's gradient is left out: no router reads it, and ranks that a token does not visit do not compute it.
    """
    active = probs != 0
    x, probs = x.clone().requires_grad_(x_needs_grad), probs.clone().requires_grad_()
    lora_A, lora_B = lora_A.clone().requires_grad_(), [b.clone().requires_grad_() for b in lora_B]
    y = dispatcher.run(x, probs, ExpertWeights(lora_A, lora_B, SCALING), LAYER)
    y.backward(cotangent)
    found = {
        "y": y.detach(),
        "probs": probs.grad * active,
        "A": lora_A.grad,
        "B0": lora_B[0].grad,
        "B1": lora_B[1].grad,
    }
    return {**found, "x": x.grad} if x_needs_grad else found


def expected_of(rank: int, case: Case, data: dict, group: list[int], held: slice) -> dict:
    """What one process with all experts finds for this rank; experts' gradients are summed over the EP group."""
    results = [
        run_one(LocalTokenDispatcher(), data["x"][i], data["probs"][i], data["A"], data["B"], data["cotangent"][i])
        for i in group
    ]
    own = results[group.index(rank)]
    summed = {key: sum(result[key] for result in results) for key in ("A", "B0", "B1")}
    found = {"y": own["y"], "probs": own["probs"], "A": summed["A"][:, held]}
    found |= {"B0": summed["B0"][held], "B1": summed["B1"][held]}
    return {**found, "x": own["x"]} if case.x_needs_grad else found


def compare_on_rank(rank: int, world_size: int) -> dict:
    """Per case and dispatcher: the largest difference of each tensor, and the bytes sent and those expected."""
    report = {}
    topologies = {ep_size: expert_parallel(ep_size) for ep_size in (2, 4) if ep_size <= world_size}
    for name, case in CASES[world_size].items():
        topology, data = topologies[case.ep_size], all_data(case)
        first = rank - topology.ep_rank
        group, local = list(range(first, first + case.ep_size)), topology.local_experts(E)
        held = slice(local.start, local.stop)
        expected = expected_of(rank, case, data, group, held)
        for kind, dispatcher_type in DISPATCHERS.items():
            dispatcher = dispatcher_type(topology)
            inputs = (data["x"][rank], data["probs"][rank], data["A"][:, held], [b[held] for b in data["B"]])
            found = run_one(dispatcher, *inputs, data["cotangent"][rank], case.x_needs_grad)
            assert found.keys() == expected.keys()
            report[name, kind] = {
                "shapes": all(found[key].shape == expected[key].shape for key in expected),
                "errors": {k: (found[k] - v).abs().max().item() for k, v in expected.items() if v.numel()},
                "bytes": dict(dispatcher.stats.bytes),
                "calls": dict(dispatcher.stats.calls),
                "expected_bytes": expected_bytes(rank, case, data, group),
            }
    return report


def break_on_rank(rank: int, world_size: int, ep_size: int, broken: list[int]) -> str:
    """The error that this rank gets when the routing of some ranks is not finite."""
    case = Case(ep_size, (2,) * world_size)
    data, topology = all_data(case), expert_parallel(ep_size)
    probs = data["probs"][rank]
    if rank in broken:
        probs[1, 0, 3] = float("nan") if rank % 2 else float("inf")
    local = topology.local_experts(E)
    experts = ExpertWeights(data["A"][:, local], [b[local] for b in data["B"]], SCALING)
    try:
        AllToAllTokenDispatcher(topology).run(data["x"][rank], probs, experts, LAYER)
    except FloatingPointError as error:
        return str(error)
    return ""


# Per number of ranks: ep_size, and the ranks whose routing is broken.
BROKEN = {2: [(2, [0])], 4: [(4, [2]), (4, [1, 3]), (2, [3])]}


def on_rank(rank: int, world_size: int) -> tuple[list[str], dict]:
    """The errors come first: what follows shows that the groups still work."""
    messages = [break_on_rank(rank, world_size, *case) for case in BROKEN[world_size]]
    return messages, compare_on_rank(rank, world_size)


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def results(request):
    return run_distributed(on_rank, request.param, timeout_s=300)


@pytest.fixture
def reports(results):
    return [report for _, report in results]


@pytest.mark.distributed
def test_outputs_and_gradients_are_those_of_one_process(reports):
    for rank, report in enumerate(reports):
        for case, result in report.items():
            assert result["shapes"], (rank, case)
            assert all(error < 1e-12 for error in result["errors"].values()), (rank, case, result["errors"])


@pytest.mark.distributed
def test_bytes_are_those_of_the_routing_matrix(reports):
    seen = 0
    for rank, report in enumerate(reports):
        for (case, kind), result in report.items():
            if kind == "tokens":
                assert result["bytes"] == result["expected_bytes"], (rank, case)
                assert set(result["calls"].values()) == {1}, (rank, case, "every collective runs once, also when empty")
                seen += sum(result["bytes"].values())
    assert seen > 0


@pytest.mark.distributed
def test_gathering_weights_moves_the_same_bytes_whatever_the_tokens(reports):
    # 4 ranks in one group hold 2 experts each, 2 ranks 4: G r D + r O values per expert, to each other rank.
    for report in reports:
        for (case, kind), result in report.items():
            if kind == "weights":
                ep_size = CASES[len(reports)][case].ep_size
                moved = (ep_size - 1) * (E // ep_size) * (G * R * D + R * sum(OUT)) * 8
                assert result["bytes"] == {"gather": moved, "reduce_scatter": moved}


@pytest.mark.distributed
def test_non_finite_routing_raises_on_every_rank_of_the_group_naming_layer_and_rank(results):
    for rank, (messages, _) in enumerate(results):
        for (ep_size, broken), message in zip(BROKEN[len(results)], messages, strict=True):
            if rank // ep_size != broken[0] // ep_size:
                assert message == "", "the other group goes on"
                continue
            who = f"rank{'s' if len(broken) > 1 else ''} {', '.join(map(str, broken))}"
            assert message.startswith(f"non-finite routing in {LAYER} on {who}:")
