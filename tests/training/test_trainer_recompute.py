"""Activation checkpointing by the Trainer's own switch."""

import pytest
import torch

from tests.tiny import ragged_batch, tiny_config, tiny_model
from tests.training.small_trainer import Rows, logged, make_trainer, trainable

SETTINGS = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.1}


def trained(folder, **settings):
    """Losses, evaluation losses and weights of four steps with an evaluation in between, dropout on."""
    model, runs = tiny_model(tiny_config(lora_dropout=0.2)), []
    model.input_groups[0].register_forward_hook(lambda *_: runs.append(1))
    trainer = make_trainer(model, Rows(ragged_batch(rows=8, width=8)), folder, **SETTINGS, **settings)
    torch.manual_seed(5)
    trainer.train()
    return (
        logged(trainer, "loss"),
        logged(trainer, "eval_loss"),
        logged(trainer, "sparsity_loss"),
        trainable(model),
        len(runs),
    )


def test_training_evaluation_and_training_on_are_those_without(tmp_path):
    plain = trained(tmp_path)
    recomputed = trained(tmp_path, activation_checkpointing=True)
    assert len(plain[0]) == 4 and len(plain[1]) == 2 and plain[1][0] != plain[1][1]
    assert (plain[4], recomputed[4]) == (4 + 4, 4 * 2 + 4), "four steps, and two evaluations of two batches"
    for found, expected in zip(recomputed[:3], plain[:3], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for name, expected in plain[3].items():
        assert (recomputed[3][name] - expected).norm() <= 1e-6 * expected.norm(), name


def test_reentrant_checkpointing_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="pass use_reentrant=False"):
        trained(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})


def test_recomputation_and_compilation_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="--torch_compile can trace neither.*activation_checkpointing"):
        trained(tmp_path, activation_checkpointing=True, torch_compile=True)
