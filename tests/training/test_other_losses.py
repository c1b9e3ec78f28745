"""The Trainer on models whose loss is no causal one: a classifier with a head that is trained in full."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ldmole_ds.model import LDMoLEModel
from ldmole_ds.training.trainer import LDMoLETrainer
from tests.families import CAUSAL, CLASSIFIERS, awake_model
from tests.tiny import ragged_batch, tiny_config

ROWS = 8


class Rows(Dataset):
    def __init__(self):
        batch = ragged_batch(rows=ROWS, width=7)
        mask = batch["attention_mask"].flip(1)
        self.columns = {
            "input_ids": batch["input_ids"].clamp(min=3) * mask,
            "attention_mask": mask,
            "labels": torch.tensor([0, 2, 1, 1, 2, 0, 0, 1]),
        }

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def batch(self, start=0, stop=ROWS):
        return {name: column[start:stop] for name, column in self.columns.items()}


def classifier(family="llama, classifying"):
    family = CLASSIFIERS[family]
    return awake_model(family.build(), tiny_config(modules_to_save=[family.head]))


def make_trainer(model, folder, **settings):
    """Plain gradient descent with rate 1 on rows in order, so that one step moves a weight by its gradient."""
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(**{**values, **settings})
    return LDMoLETrainer(model, args, train_dataset=Rows(), eval_dataset=Rows())


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_one_step_in_two_micro_batches_is_the_mean_of_both(tmp_path, family, smoothing):
    model, plain, rows = classifier(family), classifier(family), Rows()
    before, losses, entropies = trainable(model), [], []
    for start in (0, 4):
        batch = rows.batch(start, start + 4)
        output = plain.train()(**batch)
        smoothed = F.cross_entropy(output.logits, batch["labels"], label_smoothing=smoothing)
        loss = smoothed + plain.weighted(output.aux_losses)
        (loss / 2).backward()
        losses.append(loss.item())
        entropies.append(F.cross_entropy(output.logits, batch["labels"]).item())
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=smoothing)
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "loss" in row)
    assert logged["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert logged["cross_entropy_loss"] == pytest.approx(sum(entropies) / 2, rel=1e-4)
    after, grads = trainable(model), {name: p.grad for name, p in plain.named_parameters()}
    for name, value in before.items():
        moved = value - after[name]
        assert grads[name].norm() > 0 and (moved - grads[name]).norm() < 1e-2 * grads[name].norm(), name


def test_a_classifier_learns_is_evaluated_saved_and_loaded(tmp_path):
    model, rows = classifier(), Rows()
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "gradient_accumulation_steps": 1, "max_steps": 30}
    trainer = make_trainer(model, tmp_path, **settings)
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
    trainer = make_trainer(awake_model(CAUSAL["gpt2"].build(), tiny_config()), tmp_path)
    assert trainer._loss_shifts_labels and trainer.model_accepts_loss_kwargs
    assert not make_trainer(classifier(), tmp_path).model_accepts_loss_kwargs


@pytest.mark.parametrize(("flag", "asked"), [("bf16", "float32"), ("bf16", "float16")])
def test_adapters_that_the_engine_would_cast_are_refused(tmp_path, monkeypatch, flag, asked):
    monkeypatch.setattr(LDMoLETrainer, "_zero_stage", 2)
    model = awake_model(CAUSAL["llama"].build().bfloat16(), tiny_config(adapter_dtype=asked))
    with pytest.raises(ValueError, match=f"adapter_dtype={asked} under --{flag}.*leave out --{flag}.*--dtype bfloat16"):
        make_trainer(model, tmp_path, **{flag: True})
    make_trainer(model, tmp_path)
