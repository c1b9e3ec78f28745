"""The Trainer's loss: shifted cross-entropy with label smoothing, plus every auxiliary loss, whatever the layout."""

from __future__ import annotations

import pytest

from tests.distributed_utils import run_distributed
from tests.training.trainer_runs import STEPS, assert_same, by_hand, make_trainer, train, train_on_ranks


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_process_trains_as_the_loss_written_out(accumulation):
    assert_same(train(make_trainer(8 // accumulation, accumulation)), by_hand([8] * STEPS, 8 // accumulation))


@pytest.mark.distributed
def test_two_ranks_train_as_one_process():
    cases = [(4, 1, 1, 2), (4, 1, 2, 2), (2, 2, 2, 2), (2, 2, 2, 3)]
    expected = {accumulation: by_hand([8] * STEPS, 8 // accumulation) for accumulation in (1, 2)}
    for results in run_distributed(train_on_ranks, 2, cases, deepspeed=True, timeout_s=300):
        for (_, accumulation, *_), found in zip(cases, results, strict=True):
            assert_same(found, expected[accumulation])
