"""Rows that come home are added in the same order every time, on a GPU too.

There one `index_add_` adds the rows of a token in any order, so sums would round otherwise from pass to pass: with
activation checkpointing the second pass would find other experts active, and send other numbers of rows.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmole_ds.distributed import AllToAllTokenDispatcher, ExpertParallel
from ldmole_ds.layers import ForwardContext, build_router
from tests.layers.small_group import D, E, make_group, projections

RANKS = 4
FOURTH = ExpertParallel(RANKS, 1, ep_group=object(), edp_group=object(), world_size=RANKS, rank=1)


class NoTokenTwice(TorchDispatchMode):
    """Counts `index_add_` calls; raises where one adds two rows to the same place."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index_add_.default:
            assert args[2].unique().numel() == args[2].numel(), "the order of these additions is a GPU's to choose"
            self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def echoing_peers(monkeypatch):
    """Three peers that send back what they get."""

    class Finished:
        def wait(self):
            return None

    def all_to_all(out, data, *splits, group=None, async_op=False):
        out.copy_(data) if out.shape == data.shape else out.fill_(0.5)
        return Finished()

    replaced = {"all_to_all_single": all_to_all, "get_world_size": lambda group: RANKS, "get_rank": lambda group: 1}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.distributed, name, value)


def test_a_call_adds_one_row_to_a_token(echoing_peers):
    assert E % RANKS == 0
    mlp = {"lambda_mlp": None, "owns_lambda_mlp": False}
    dispatcher = AllToAllTokenDispatcher(FOURTH)
    group = make_group(topology=FOURTH, dispatcher=dispatcher, awake=True, router=build_router("softmax"), **mlp)
    layers, x = projections(group), torch.randn(2, 5, D).requires_grad_()
    with NoTokenTwice() as mode:
        with group.holder.use(ForwardContext()):
            outputs = [layer(x) for layer in layers]
        assert mode.calls == (RANKS - 1) * len(layers), "every token goes to every peer"
        sum(y.square().sum() for y in outputs).backward()
    assert mode.calls == (RANKS - 1) * (len(layers) + 1)
    assert x.grad.abs().max() > 0
