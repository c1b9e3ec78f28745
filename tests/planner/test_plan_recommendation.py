"""Which layouts are compared, where weights and tokens cross, and what is recommended and why."""

from dataclasses import replace

import pytest

from ldmole_ds.distributed.dispatch_choice import Workload, choose_dispatch
from ldmole_ds.planner import Batch, Layout, Routing, layouts, recommend
from tests.planner.plan_cases import DEVICE, cluster, job, shape


def recommended(planned):
    found = layouts(planned.cluster, planned.shape.config.num_experts)
    return recommend(planned, [planned.estimate(layout) for layout in found])


def test_layouts_divide_ranks_and_experts():
    found = layouts(cluster(1, 4), 6)
    assert {layout.ep_size for layout in found} == {1, 2}
    assert {(x.ep_size, x.zero_stage) for x in found if x.zero_stage == 0} == {(1, 0)}
    assert {x.dispatch for x in layouts(cluster(1, 4), 4, ep_size=4, dispatch="tokens")} == {"tokens"}
    with pytest.raises(ValueError, match=r"--ep_size 3 must divide 4 ranks and 6 experts: use one of \[1, 2\]"):
        layouts(cluster(1, 4), 6, ep_size=3)
    with pytest.raises(ValueError, match="stage 0 does not go with partitioned experts"):
        layouts(cluster(1, 4), 4, ep_size=2, zero_stage=0)


def test_the_crossover_is_where_auto_changes_its_mind():
    planned = job(shape(num_experts=64, r=16), active_experts=2)
    crossing = planned.crossover(4)
    assert crossing > 10

    def mode(tokens):
        return choose_dispatch(
            Workload(tokens, 2),
            planned.cluster.exchange_link(4),
            ep_size=4,
            num_experts=64,
            r=16,
            in_features=10,
            out_features=[6, 4],
        ).mode

    assert (mode(int(crossing) - 1), mode(int(crossing) + 2)) == ("tokens", "weights")


def test_small_experts_are_replicated():
    best, reason = recommended(job())
    assert best.layout == Layout(1, 2, "replicate")
    assert reason.startswith("experts replicated, ZeRO-2")


def test_experts_that_do_not_fit_are_partitioned():
    many = shape(num_experts=64, r=64)
    whole = job(many).estimate(Layout()).memory.total
    tight = replace(DEVICE, memory=whole)
    best, reason = recommended(job(many, on=cluster(device=tight), batch=Batch(1, 2)))
    assert best.layout.ep_size > 1 and best.memory.total < whole
    assert "replicate" in reason


def test_nothing_fits():
    best, reason = recommended(job(on=cluster(device=replace(DEVICE, memory=100.0))))
    assert best is None
    assert reason.startswith("No layout fits: the smallest") and "--" in reason


def test_skew_slows_tokens_alone_and_no_more_than_everything_on_one_rank():
    even, skewed = (job(active_experts=1, skew=skew) for skew in (1.0, 2.0))
    for dispatch, slower in (("tokens", True), ("weights", False)):
        times = [planned.estimate(Layout(4, 2, dispatch)).step_seconds for planned in (even, skewed)]
        assert (times[1] > times[0]) == slower


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batch(0, 1), "micro must be at least 1"),
        (lambda: Layout(2, 2, "replicate"), "does not go with ep_size 2"),
        (lambda: Routing(active_experts=2, skew=0.5), "skew at least 1"),
        (lambda: cluster(0), "nodes must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
