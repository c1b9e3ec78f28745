"""The Trainer on models whose loss is no causal one: a classifier with a head that is trained in full."""

import pytest
import torch
from torch.nn import functional as F

from ldmole_ds.model import LDMoLEModel
from ldmole_ds.training.trainer import LDMoLETrainer
from tests.families import CAUSAL, CLASSIFIERS, awake_model
from tests.tiny import ragged_batch, tiny_config
from tests.training.small_trainer import Rows, logged, make_trainer, trainable


def make_rows():
    batch = ragged_batch(rows=8, width=7)
    mask = batch["attention_mask"].flip(1)
    ids = batch["input_ids"].clamp(min=3) * mask
    return Rows({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1, 2, 0, 0, 1])})


def classifier(family="llama, classifying"):
    family = CLASSIFIERS[family]
    return awake_model(family.build(), tiny_config(modules_to_save=[family.head]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_one_step_in_two_micro_batches_is_the_mean_of_both(tmp_path, family, smoothing):
    model, plain, rows = classifier(family), classifier(family), make_rows()
    before, losses, entropies = trainable(model), [], []
    for start in (0, 4):
        batch = rows.batch(start, start + 4)
        output = plain.train()(**batch)
        smoothed = F.cross_entropy(output.logits, batch["labels"], label_smoothing=smoothing)
        loss = smoothed + plain.weighted(output.aux_losses)
        (loss / 2).backward()
        losses.append(loss.item())
        entropies.append(F.cross_entropy(output.logits, batch["labels"]).item())
    settings = {"gradient_accumulation_steps": 2, "label_smoothing_factor": smoothing}
    trainer = make_trainer(model, rows, tmp_path, **settings)
    trainer.train()
    assert logged(trainer, "loss").item() == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert logged(trainer, "cross_entropy_loss").item() == pytest.approx(sum(entropies) / 2, rel=1e-4)
    after, grads = trainable(model), {name: p.grad for name, p in plain.named_parameters()}
    for name, value in before.items():
        moved = value - after[name]
        assert grads[name].norm() > 0 and (moved - grads[name]).norm() < 1e-2 * grads[name].norm(), name


def test_a_classifier_learns_is_evaluated_saved_and_loaded(tmp_path):
    model, rows = classifier(), make_rows()
    trainer = make_trainer(model, rows, tmp_path, optim="adamw_torch", learning_rate=1e-2, max_steps=30)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    with torch.no_grad():
        expected = model.eval()(**rows.batch())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert expected.loss < 0.5 * start
    trainer.save_model()
    loaded = LDMoLEModel.from_pretrained(CLASSIFIERS["llama, classifying"].build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**rows.batch()).logits, expected.logits)


def test_gpt2_without_a_loss_type_has_the_causal_loss(tmp_path):
    """Its class names no loss type; counted as unshifted, its loss would be divided by the wrong number of labels."""
    trainer = make_trainer(awake_model(CAUSAL["gpt2"].build(), tiny_config()), make_rows(), tmp_path)
    assert trainer._loss_shifts_labels and trainer.model_accepts_loss_kwargs
    assert not make_trainer(classifier(), make_rows(), tmp_path).model_accepts_loss_kwargs


@pytest.mark.parametrize(("flag", "asked"), [("bf16", "float32"), ("bf16", "float16")])
def test_adapters_that_the_engine_would_cast_are_refused(tmp_path, monkeypatch, flag, asked):
    monkeypatch.setattr(LDMoLETrainer, "_zero_stage", 2)
    model = awake_model(CAUSAL["llama"].build().bfloat16(), tiny_config(adapter_dtype=asked))
    with pytest.raises(ValueError, match=f"adapter_dtype={asked} under --{flag}.*leave out --{flag}.*--dtype bfloat16"):
        make_trainer(model, make_rows(), tmp_path, **{flag: True})
    make_trainer(model, make_rows(), tmp_path)
