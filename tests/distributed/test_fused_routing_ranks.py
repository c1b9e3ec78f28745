"""Tokens that travel by the routing kernel's plan: the same as by the plan made from the routing weights."""

from __future__ import annotations

import os

import pytest
import torch

from ldmole_ds.distributed import AllToAllTokenDispatcher, expert_parallel
from ldmole_ds.layers import ForwardContext
from ldmole_ds.ops import fused_routing
from tests.distributed_utils import run_distributed
from tests.layers.small_group import D, make_group, projections

pytest.importorskip("triton", reason="the routing kernel needs triton: pip install triton")


def one_pass(rank: int, switch: str) -> dict:
    os.environ[fused_routing.SWITCH] = switch
    topology = expert_parallel(2)
    dispatcher = AllToAllTokenDispatcher(topology)
    torch.manual_seed(7)
    group = make_group(("q", "k"), topology=topology, dispatcher=dispatcher)
    with torch.no_grad():  # few experts for a token, so that some tokens stay at home
        group.gate.mul_(8)
        group.lambda_mlp.bias_out.fill_(4)
    layers = projections(group)
    torch.manual_seed(rank)
    # Rows without a token to send, too: each rank has another number of tokens, and padding.
    x = torch.randn(1, 9 + 3 * rank, D).requires_grad_()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, :2] = False
    context = ForwardContext(padding_mask=mask)
    with group.holder.use(context):
        outputs = [layer(x) for layer in layers]
    sum(y.square().sum() for y in outputs).backward()
    assert (context.records[0].sums is not None) == (switch == "on")
    grads = {name: p.grad for name, p in group.named_parameters()}
    rows = dict(dispatcher.stats.rows)
    assert 0 < rows["dispatch"] < int(mask.sum())
    return {"x": x.grad, **grads, **{str(i): y.detach() for i, y in enumerate(outputs)}}, rows


def both(rank: int, world_size: int) -> list:
    return [one_pass(rank, switch) for switch in ("off", "on")]


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on a CPU need Triton's interpreter, which is off here")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_two_ranks():
    for (plain, plain_rows), (fused, fused_rows) in run_distributed(both, 2, timeout_s=120):
        assert fused_rows == plain_rows
        assert fused.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-5, msg=name)
