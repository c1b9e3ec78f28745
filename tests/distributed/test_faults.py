"""No silent hang: when a rank dies, stops, raises or routes NaN in the middle of training, its peers say so and end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from ldmole_ds.distributed import PeerError
from ldmole_ds.distributed.shared_memory import SWITCH
from ldmole_ds.model import ldmole_param_groups
from ldmole_ds.training.runtime import limit_group_timeouts
from tests.distributed_utils import CAN_SHARE, RankError, run_distributed
from tests.tiny import ragged_batch, tiny_model

GROUP_TIMEOUT_S, FAULTY_RANK, FAULTY_STEP = 6, 1, 3
LAYER = "model.layers.1.mlp.down_proj"


def misbehave(fault: str, model) -> None:
    """Called by one layer of the faulty rank, in the middle of a forward pass."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "raise":
        raise ValueError("this rank has had enough")
    elif fault == "nan":
        with torch.no_grad():
            next(g for g in model.input_groups if g.name == LAYER).gate.fill_(float("nan"))


def train_with_fault(rank: int, world_size: int, fault: str, expert_dispatch: str) -> list[str]:
    """Trains five steps; what the surviving ranks raise comes back as text."""
    import deepspeed

    model = tiny_model(ep_size=2, expert_dispatch=expert_dispatch)
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    limit_group_timeouts(GROUP_TIMEOUT_S)
    step = 0
    if rank == FAULTY_RANK:
        layer = next(g for g in model.input_groups if g.name == LAYER)
        layer.register_forward_pre_hook(lambda module, args: misbehave(fault, model) if step == FAULTY_STEP else None)
    begin = time.monotonic()
    try:
        for step in range(1, 6):
            begin = time.monotonic()
            engine.backward(engine(**ragged_batch(seed=step)).loss)
            engine.step()
    except (PeerError, FloatingPointError) as error:
        return [type(error).__name__, str(error), f"{time.monotonic() - begin:.1f}"]
    return []


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "expert_dispatch", "phase", "shared_memory"),
    [
        ("kill", "tokens", "counts", "on"),
        ("stop", "tokens", "counts", "on"),
        ("raise", "tokens", "counts", "on"),
        ("kill", "weights", "gather", "on"),
        ("kill", "tokens", "counts", "off"),
        ("stop", "tokens", "counts", "off"),
        ("kill", "weights", "gather", "off"),
    ],
)
def test_peers_say_where_they_stood(fault, expert_dispatch, phase, shared_memory, monkeypatch):
    if shared_memory == "on" and not CAN_SHARE:
        pytest.skip("needs Linux and a C compiler")
    monkeypatch.setenv(SWITCH, shared_memory)
    monkeypatch.setattr("tests.distributed_utils._GRACE_S", 4.0)
    report = survivors(fault, expert_dispatch)
    assert f"rank 0 stopped in phase '{phase}' of {LAYER}, step {FAULTY_STEP}" in report
    assert "look for the first error in the other ranks' output" in report


def survivors(fault: str, expert_dispatch: str) -> str:
    """What a job of two ranks with a faulty one reports. It must end by itself."""
    begin = time.monotonic()
    try:
        (kind, message, seconds), *_ = run_distributed(
            report_error, 2, fault, expert_dispatch, deepspeed=True, timeout_s=120
        )
    except RankError as error:
        return str(error)
    except TimeoutError:
        pytest.fail(f"no end after {time.monotonic() - begin:.0f} s")
    return f"{kind}: {message} ({seconds})"


def report_error(rank: int, world_size: int, fault: str, expert_dispatch: str) -> None:
    """Raises what was caught, so that the job ends as a real one does."""
    caught = train_with_fault(rank, world_size, fault, expert_dispatch)
    if caught:
        raise RuntimeError(": ".join(caught))


@pytest.mark.distributed
@pytest.mark.parametrize("expert_dispatch", ["tokens", "weights"])
def test_nan_in_one_ranks_routing_stops_all_ranks_naming_the_layer(expert_dispatch):
    for kind, message, _ in run_distributed(train_with_fault, 2, "nan", expert_dispatch, deepspeed=True):
        assert kind == "FloatingPointError"
        assert message.startswith(f"non-finite routing in {LAYER}")
