"""The planner counts experts' products as the layers compute them: grouped on a CPU where that is cheaper."""

from dataclasses import replace

import pytest
import torch

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model.dispatch_plan import GroupShape
from ldmole_ds.ops import expert_compute
from ldmole_ds.ops.expert_compute import SWITCH, choose_products, may_be_grouped
from ldmole_ds.ops.grouped_experts import GROUPED
from ldmole_ds.planner import Batch, Layout, Precision
from ldmole_ds.planner.compute import dense_seconds, expert_seconds
from tests.planner.plan_cases import DEVICE, cluster, job, shape

# 10 GFLOPS, a thread for each rank.
CPU = replace(DEVICE, grouped_speed=1.0)


def large(num_experts: int = 64, r: int = 16, width: int = 256):
    """One projection, D and O alike."""
    groups = (GroupShape(num_experts, width, [width]),)
    return replace(shape(), config=LDMoLEConfig(num_experts=num_experts, r=r), groups=groups)


def seconds(device, pairs: float = 2048, rows: float = 1024, passes: int = 3, item: int = 4) -> float:
    model = large()
    return expert_seconds(model, model.groups[0], rows, 64, pairs, passes, device, item)


def test_large_experts_take_what_their_active_pairs_take(monkeypatch):
    for name, cost in (("PER_PAIR_VALUE", 230.0), ("PER_TOKEN_VALUE", 150.0), ("PER_EXPERT", 4e6)):
        monkeypatch.setattr(expert_compute, name, cost)
    # Pairs: 2,048 x 512 values x (6 x 16 + 230); rows: 1,024 x 512 x 150; experts: 64 x 4e6: 676,478,976 operations.
    grouped = 0.0676478976
    assert seconds(CPU) == pytest.approx(grouped)
    assert seconds(CPU, passes=4) == pytest.approx(grouped * 4 / 3)
    assert seconds(replace(CPU, grouped_speed=0.5)) == pytest.approx(grouped * 2)
    # Dense: 6 x 1,024 x 1,024 x 512 operations, and 9 x 1,024 x 1,024 values between them.
    dense = 0.3221225472 + 9 * 2**20 * 4 / 1e9
    assert seconds(DEVICE) == pytest.approx(dense)
    # Few threads' worth of small products, all experts in use, bfloat16: dense as well.
    assert seconds(replace(CPU, grouped_speed=0.1)) == seconds(CPU, pairs=64 * 1024) == seconds(DEVICE)
    assert seconds(CPU, item=2) == seconds(DEVICE, item=2)


@pytest.mark.parametrize(("e", "r"), [(8, 8), (16, 16), (64, 16), (128, 32)])
@pytest.mark.parametrize("tokens", [128, 1024])
@pytest.mark.parametrize("active", [0.5, 1, 2, 4, 8])
@pytest.mark.parametrize("slow", [False, True])
def test_the_planner_groups_where_the_layer_does(e, r, tokens, active, slow, monkeypatch):
    monkeypatch.setattr(expert_compute.matrix_products, "torch_is_slow", lambda: slow)
    cpu = replace(CPU, grouped_margin=expert_compute.grouped_margin())
    weights = torch.zeros(tokens, 1, e)
    weights.view(-1)[: int(tokens * active)] = 1.0
    assert torch.get_num_threads() == 1
    chosen = choose_products(weights, torch.empty(1, e, r, 256), [torch.empty(e, r, 256)])
    model = large(e, r)
    args = (model, model.groups[0], tokens, e)
    grouped = expert_seconds(*args, tokens * active, 3, cpu, 4, asked_once=True) != dense_seconds(*args, 3, cpu, 4)
    assert grouped == (chosen is GROUPED)
    # A layer whose tokens stay asks first for all tokens, with dense products by the quicker library.
    may = may_be_grouped(tokens, torch.empty(1, e, r, 256), [256])
    grouped = expert_seconds(*args, tokens * active, 3, cpu, 4) != dense_seconds(*args, 3, cpu, 4)
    assert grouped == (may and chosen is GROUPED)


def test_the_switch_holds_for_plans_too(monkeypatch):
    monkeypatch.setenv(SWITCH, "dense")
    assert seconds(CPU) == seconds(DEVICE)


@pytest.mark.parametrize("layout", [Layout(), Layout(4, 2, "weights"), Layout(4, 2, "tokens")])
def test_steps_count_them(layout):
    """1,024 tokens, two experts each; under tokens a rank has 16 experts, a quarter of the pairs, and others' rows."""

    def step(device, **routing):
        planned = job(large(), on=cluster(device=device), batch=Batch(4, 256), active_experts=2, **routing)
        return planned.estimate(layout).compute_seconds

    group = large().groups[0]
    calls = [(1024, 64, 2048)]
    if layout.dispatch == "tokens":
        calls = [(1024, 16, 512), (1024, 16, 1536)]
    saved = sum(
        expert_seconds(large(), group, *call, 3, DEVICE, 4) - expert_seconds(large(), group, *call, 3, CPU, 4)
        for call in calls
    )
    assert saved > 0.05
    assert step(DEVICE, remote_ranks=1.0) - step(CPU, remote_ranks=1.0) == pytest.approx(saved)


def test_on_a_gpu_nothing_is_grouped():
    gpu = replace(DEVICE, asynchronous=True)
    planned = replace(job(large(), on=cluster(device=gpu), active_experts=2), precision=Precision(2, 2))
    everything = replace(job(large(), on=cluster(device=gpu), active_experts=64), precision=Precision(2, 2))
    assert planned.estimate(Layout()).compute_seconds == everything.estimate(Layout()).compute_seconds
