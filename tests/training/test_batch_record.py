"""Resuming with another batch: refused where the batch grows, else warned of; the same batch in any layout goes on."""

from __future__ import annotations

import logging
import re

import pytest

from ldmole_ds.checkpoint import CheckpointError
from ldmole_ds.training.batch import BatchSizeWarmup
from ldmole_ds.training.batch_record import BatchRecord, check_batch
from tests.training.trainer_runs import make_trainer

WARMUP = BatchSizeWarmup(start=2, steps=3)
GROWN = "--global_batch_size 8 --batch_size_warmup_start 2 --batch_size_warmup_steps 3"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of one step each, with and without warm-up."""
    found = {}
    for name, warmup in (("grown", WARMUP), ("plain", None)):
        folder = tmp_path_factory.mktemp(name)
        settings = {"output_dir": str(folder), "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        make_trainer(2, 4, batch_size_warmup=warmup, **settings).train()
        found[name] = folder / "checkpoint-1"
    return found


@pytest.mark.parametrize(
    ("saved", "accumulation", "warmup", "has"),
    [
        ("grown", 4, BatchSizeWarmup(4, 3), "--global_batch_size 8 --batch_size_warmup_start 4"),
        ("grown", 4, BatchSizeWarmup(2, 2), f"{GROWN[:-1]}2"),
        ("grown", 8, WARMUP, "--global_batch_size 16 --batch_size_warmup_start 2 --batch_size_warmup_steps 3"),
        ("grown", 4, None, "--global_batch_size 8 without batch-size warm-up"),
        ("plain", 4, WARMUP, GROWN),
    ],
)
def test_another_warmup_is_refused_before_the_start(checkpoints, monkeypatch, saved, accumulation, warmup, has):
    folder = checkpoints[saved]
    trainer = make_trainer(2, accumulation, batch_size_warmup=warmup, max_steps=2)
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: pytest.fail("training began"))
    was = GROWN if saved == "grown" else "--global_batch_size 8 without batch-size warm-up"
    message = f"{folder} was saved with {was}, this run has {has}"
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        trainer.train(resume_from_checkpoint=str(folder))
    assert f"start a new run from its weights with --adapter_name_or_path {folder}" in str(caught.value)


def test_another_batch_without_warmup_is_warned_of(checkpoints, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(2, 2, max_steps=2)
        trainer.train(resume_from_checkpoint=str(checkpoints["plain"]))
    assert trainer.state.global_step == 2
    assert "checkpoint-1 was saved with 8 rows a step, this run has 4: it goes on at other rows" in caplog.text
    assert "resume with --global_batch_size 8" in caplog.text


@pytest.mark.parametrize("saved", ["grown", "plain"])
def test_the_same_batch_goes_on_in_silence(checkpoints, caplog, saved):
    record = BatchRecord(8, WARMUP if saved == "grown" else None)
    with caplog.at_level(logging.WARNING):
        check_batch(checkpoints[saved], record)
        trainer = make_trainer(4, 2, batch_size_warmup=record.warmup)  # other micro-batches
        assert trainer._batch_record == record
    assert "rows" not in caplog.text


def test_a_checkpoint_that_notes_no_batch_fits_any(tmp_path):
    check_batch(tmp_path, BatchRecord(8, WARMUP))
