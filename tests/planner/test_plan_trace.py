"""The traced step is the real one: same operations, same memory; a deep model is continued from a shallow one."""

import pytest
import torch

from ldmole_ds.model import get_ldmole_model
from ldmole_ds.planner import StepKind
from ldmole_ds.planner.model_shape import build_base
from ldmole_ds.planner.trace import op_seconds, trace_model, trace_step
from tests.planner.plan_cases import DEVICE, small_hf_config
from tests.tiny import tiny_config


def test_recomputing_computes_more_and_keeps_less():
    keep, recompute = (
        trace_step(small_hf_config(3), tiny_config(), StepKind(checkpointing=c), micro=4, length=64) for c in (0, 1)
    )
    assert recompute.peak < 0.8 * keep.peak
    assert 1.2 * keep.seconds(DEVICE) < recompute.seconds(DEVICE) < 1.6 * keep.seconds(DEVICE)


def test_further_layers_add_what_the_third_added():
    continued = trace_step(small_hf_config(5), tiny_config(), StepKind(), micro=2, length=16)
    with StepKind().fake_tensors():
        model = StepKind().prepare(get_ldmole_model(build_base(small_hf_config(5)), tiny_config()))
        whole = trace_model(model, torch.zeros(2, 16, dtype=torch.long))
    assert continued.more_layers == 3
    assert continued.seconds(DEVICE) == pytest.approx(whole.seconds(DEVICE), rel=0.01)
    assert continued.peak == pytest.approx(whole.peak, rel=0.02)


@pytest.mark.parametrize("kind", [StepKind(), StepKind(grouped_speed=0.0, whole=True)])
def test_every_product_is_counted(kind):
    """Of rank r more: x A^T and (h w) B, each with two products of its size in backward, whether in place or not."""
    found = {}
    for r in (2, 4):
        found[r] = trace_step(small_hf_config(), tiny_config(r=r), kind, micro=2, length=12).first
        found[r] = sum(flops * n for (_, flops, _), n in found[r].ops.items())
    features = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    tokens, more = 2 * 12, 2 * tiny_config().num_experts
    expected = 2 * 3 * 2 * tokens * more * sum(d + o for d, o in features)
    expected -= 3 * 2 * tokens * more * 64  # the input of the first q, k and v, a frozen embedding, has no gradient
    assert found[4] - found[2] == expected


def test_an_operation_takes_the_longer_of_computing_and_moving():
    assert op_seconds(DEVICE, False, 10e9, 1) == 1.0
    assert op_seconds(DEVICE, True, 10e9, 1) == 0.1
    assert op_seconds(DEVICE, False, 1, 2e9) == 2.0
