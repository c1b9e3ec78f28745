"""Which checkpoint a run goes on from, and what it says about the others."""

import json
import logging

import pytest
import torch

from ldmole_ds.checkpoint import CheckpointError, TrainingState
from ldmole_ds.model.adapter_io import gather_adapter_state
from ldmole_ds.model.canonical import canonical_shapes
from ldmole_ds.model.training_state import load_state, save_state
from ldmole_ds.training.checkpointing import find_checkpoint
from tests.tiny import tiny_config, tiny_model
from tests.training.trainer_runs import make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(2, 1, output_dir=str(folder), save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def damaged(run, tmp_path):
    """The run's folder with its newest checkpoint damaged and a foreign folder beside."""
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shard = next((copy / "checkpoint-3/training_state").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    (copy / "checkpoint-4").mkdir()
    return copy


def test_the_newest_whole_one(damaged, caplog):
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(damaged, "auto").name == "checkpoint-2"
        assert find_checkpoint(damaged, True).name == "checkpoint-2"
    assert "checkpoint-4 is damaged: it has no manifest.json; trying the one before" in caplog.text
    assert "checkpoint-3 is damaged: training_state/shard-" in caplog.text
    assert "resuming from" in caplog.text and "checkpoint-2" in caplog.text


def test_none(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "auto") is None
    assert find_checkpoint(tmp_path / "nowhere", "auto") is None
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        find_checkpoint(tmp_path, True)


def test_a_named_one_must_be_whole(damaged):
    assert find_checkpoint(damaged, str(damaged / "checkpoint-1")).name == "checkpoint-1"
    with pytest.raises(CheckpointError, match="checkpoint-3 is damaged: .* Resume from an older one"):
        find_checkpoint(damaged, str(damaged / "checkpoint-3"))
    with pytest.raises(CheckpointError, match="is no training checkpoint"):
        find_checkpoint(damaged, str(damaged))


def edit_index(folder, edit):
    path = folder / "training_state/index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def expert_piece(index, suffix=".lora_A"):
    for flat in index["shards"][0]["flats"]:
        for piece in flat["pieces"]:
            if piece[0].endswith(suffix):
                return flat["pieces"], piece
    raise AssertionError


def cut_off_two_experts(index):
    _, piece = expert_piece(index)
    piece[3] = piece[3] * 6 // 8


def save_one_twice(index):
    pieces, piece = expert_piece(index)
    pieces.append([piece[0], 0, 0, piece[3] // 8])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (cut_off_two_experts, r"lora_A of rows \(experts\) 6 to 7 is missing"),
        (save_one_twice, r"lora_A of rows \(experts\) 0 to 0 is saved twice"),
        (lambda i: i.update(version=2), "version 2"),
        (lambda i: i["shapes"].popitem(), "whose shape it does not give"),
    ],
)
def test_experts_missing_or_saved_twice(damaged, edit, words):
    edit_index(damaged / "checkpoint-1", edit)
    with pytest.raises(CheckpointError, match=words):
        TrainingState(damaged / "checkpoint-1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 2}, "has shape .* this run wants .* resume with the adapter settings"),
        ({"num_experts": 4}, "has shape"),
        ({"target_modules": ["q_proj"]}, "no place for"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head"),
    ],
)
def test_a_state_of_other_settings_is_refused_and_nothing_is_loaded(run, changes, words):
    model = tiny_model(tiny_config(**changes))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = {k: v.clone() for k, v in gather_adapter_state(model).items()}
    with pytest.raises(CheckpointError, match=words):
        load_state(model, optimizer, run / "checkpoint-3")
    after = gather_adapter_state(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_optimizers_whose_state_cannot_be_cut_are_refused_after_the_first_step(tmp_path):
    trainer = make_trainer(2, 1, output_dir=str(tmp_path), save_strategy="steps", save_steps=2, optim="adafactor")
    with pytest.raises(ValueError, match="Adafactor keeps .* use --optim adamw_torch, or --save_strategy no"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_optimizers_of_one_value_per_weight_resume(tmp_path):
    for optim, moments in (("sgd", []), ("adagrad", ["sum"]), ("rmsprop", ["square_avg"])):
        folder = tmp_path / optim
        make_trainer(2, 1, output_dir=str(folder), save_strategy="steps", save_steps=1, optim=optim).train()
        assert TrainingState(folder / "checkpoint-2").moments() == moments
        whole = TrainingState(folder / "checkpoint-3")
        trainer = make_trainer(2, 1, output_dir=str(tmp_path / f"{optim}2"), optim=optim)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        live = gather_adapter_state(trainer.model)
        for key in whole.shapes:
            saved = whole.read(key)
            assert torch.equal(live[key], saved.transpose(1, 2) if key.endswith("lora_B") else saved), (optim, key)


def test_the_frozen_base_is_not_written(run):
    model = tiny_model()
    index = TrainingState(run / "checkpoint-3")
    assert index.shapes == canonical_shapes(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(p.stat().st_size for p in (run / "checkpoint-3/training_state").glob("shard-*"))
    assert 12 * trainable <= size <= 12 * trainable + 40_000  # weight and two moments, four bytes each


def test_relu_routing_keeps_where_its_control_stands(tmp_path):
    model = tiny_model(tiny_config(router="relu"))
    model.adaptive_l1.exponent.fill_(-7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    save_state(model, optimizer, tmp_path)
    other = tiny_model(tiny_config(router="relu"))
    load_state(other, torch.optim.AdamW([p for p in other.parameters() if p.requires_grad]), tmp_path)
    assert int(other.adaptive_l1.exponent) == -7
