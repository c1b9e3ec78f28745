"""Input groups in one node where experts are gathered: the loss and all gradients are those of their parts."""

from __future__ import annotations

import pytest
import torch

from ldmole_ds.layers import input_group
from ldmole_ds.ops import cpu_kernels
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_model, wake_experts


def one_step(model, batch: dict) -> dict:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}}


def both_ways(rank: int, world_size: int) -> tuple[dict, dict, int, int]:
    model = tiny_model(ep_size=2, expert_dispatch="weights").train()
    wake_experts(model)
    asked = input_group.runs_whole
    ran = []
    input_group.runs_whole = lambda group, x: ran.append(asked(group, x)) or ran[-1]
    whole = one_step(model, ragged_batch(rows=1 + rank, seed=rank))
    # On one rank alone, too: what the ranks exchange must not depend on it.
    input_group.runs_whole = lambda group, x: rank == 1 and asked(group, x)
    mixed = one_step(model, ragged_batch(rows=1 + rank, seed=rank))
    return whole, mixed, sum(ran), len(model.input_groups)


@pytest.mark.distributed
@pytest.mark.parametrize("kernel", ["c", "triton"])
def test_gathered_experts_in_one_node(kernel, monkeypatch):
    """Triton's kernels, which run on a GPU, in its interpreter."""
    if kernel == "triton":
        pytest.importorskip("triton", reason="the kernels need triton: pip install triton")
        if torch.cuda.is_available():
            pytest.skip("on a GPU they are compiled, for tensors there")
        monkeypatch.setenv("LDMOLE_FUSED_ROUTING", "on")
    elif reason := cpu_kernels.why_not():
        pytest.skip(reason)
    for whole, mixed, ran, groups in run_distributed(both_ways, 2):
        assert ran == groups, "every group runs in one node"
        assert whole.keys() == mixed.keys() and len(whole) > groups
        torch.testing.assert_close(whole, mixed, rtol=1e-4, atol=1e-6)
        assert all(grad.abs().max() > 0 for name, grad in whole.items() if "lora_" in name)
