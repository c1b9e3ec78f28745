"""Rows that travel: nobody touches them on their way, and at home they are added in the same order every time.

On a GPU one `index_add_` adds the rows of a token in any order, so sums would round otherwise from pass to pass: with
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


class InFlight:
    """An exchange whose rows arrive when it is waited for, and not before; what is sent must not change until then."""

    def __init__(self, out, data):
        self.out, self.data, self.sent = out, data, data.clone()
        if out.is_floating_point():
            out.fill_(float("nan"))

    def wait(self):
        assert torch.equal(self.data, self.sent), "rows were overwritten while they were on their way"
        self.out.copy_(self.sent) if self.out.shape == self.sent.shape else self.out.fill_(0.5)


@pytest.fixture
def echoing_peers(monkeypatch):
    """Three peers that send back what they get."""

    def all_to_all(out, data, *splits, group=None, async_op=False):
        exchange = InFlight(out, data)
        return exchange if async_op else exchange.wait()

    replaced = {
        "all_to_all_single": all_to_all,
        "get_world_size": lambda group=None: RANKS,
        "get_rank": lambda group=None: 1,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.distributed, name, value)


@pytest.fixture
def group(echoing_peers):
    assert E % RANKS == 0
    mlp = {"lambda_mlp": None, "owns_lambda_mlp": False, "router": build_router("softmax")}
    return make_group(topology=FOURTH, dispatcher=AllToAllTokenDispatcher(FOURTH), awake=True, **mlp)


def run(group):
    """Forward, then the sum of squares to go back from; and the input."""
    layers, x = projections(group), torch.randn(2, 5, D).requires_grad_()
    with group.holder.use(ForwardContext()):
        outputs = [layer(x) for layer in layers]
    return sum(y.square().sum() for y in outputs), x


def test_a_call_adds_one_row_to_a_token(group):
    members = len(group.members)
    with NoTokenTwice() as mode:
        loss, x = run(group)
        assert mode.calls == (RANKS - 1) * members, "every token goes to every peer"
        loss.backward()
    assert mode.calls == (RANKS - 1) * (members + 1)
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nobody_looks_at_rows_on_their_way(group):
    """Nor does autograd's search for NaN, which would find what was in that memory before."""
    with torch.autograd.detect_anomaly():
        loss, x = run(group)
        loss.backward()
    grads = [x.grad, *(p.grad for p in group.parameters())]
    assert loss.isfinite() and all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)
