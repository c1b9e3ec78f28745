"""An exported adapter gives the outputs of what it was exported from, and appears whole or not at all."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldmole_ds.config import CONFIG_NAME, WEIGHTS_NAME
from ldmole_ds.model import LDMoLEModel, export
from ldmole_ds.model.export import export_adapter
from ldmole_ds.model.model_card import model_card
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

BASE = {"base_model_name_or_path": "acme/base", "base_model_revision": "v3"}


def logits(model):
    with torch.no_grad():
        return model.eval()(**ragged_batch()).logits


def saved(folder, **changes):
    model = tiny_model(tiny_config(**{**BASE, **changes}))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("changes", [{}, {"router": "relu"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_the_exported_adapter_is_the_adapter(tmp_path, changes):
    model = saved(tmp_path / "run", **changes)
    for name in ("training_args.bin", "optimizer.pt", "tokenizer.json"):
        (tmp_path / "run" / name).write_bytes(b"\x80")
    facts = export_adapter(tmp_path / "run", tmp_path / "a" / "b")
    target = tmp_path / "a" / "b"
    assert sorted(p.name for p in target.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert torch.equal(logits(LDMoLEModel.from_pretrained(tiny_llama(), target)), logits(model))
    config = json.loads((target / CONFIG_NAME).read_text())
    assert {key: config[key] for key in BASE} == BASE
    assert facts["bytes"] == (target / WEIGHTS_NAME).stat().st_size and facts["base_model"] == "acme/base"
    assert facts["tensors"] == len(load_file(target / WEIGHTS_NAME))


def test_a_cast_adapter(tmp_path):
    model = saved(tmp_path / "run", router="relu", adapter_dtype="float32")
    export_adapter(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    state = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert {str(v.dtype) for v in state.values()} == {"torch.bfloat16", "torch.int64"}
    loaded = LDMoLEModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert loaded.input_groups[0].lora_A.dtype == torch.bfloat16
    expected, bare = logits(model), logits(tiny_llama())
    assert (logits(loaded) - expected).norm() < 0.05 * (expected - bare).norm()


def test_another_base_is_recorded(tmp_path):
    saved(tmp_path / "run", base_model_name_or_path="/home/me/models/base")
    export_adapter(tmp_path / "run", tmp_path / "one", base_model="acme/base", base_revision="v4")
    config = json.loads((tmp_path / "one" / CONFIG_NAME).read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("acme/base", "v4")
    # The old revision was that of the old base.
    export_adapter(tmp_path / "run", tmp_path / "two", base_model="acme/base")
    assert json.loads((tmp_path / "two" / CONFIG_NAME).read_text())["base_model_revision"] is None
    saved(tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say which base model it belongs to: pass --model_name_or_path"):
        export_adapter(tmp_path / "nameless", tmp_path / "three")


def damaged(change):
    def damage(folder):
        state = load_file(folder / WEIGHTS_NAME)
        change(state)
        save_file(state, folder / WEIGHTS_NAME)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS_NAME).write_bytes(b"1234"), "is damaged or not a safetensors file"),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), "does not exist"),
        (lambda folder: (folder / CONFIG_NAME).unlink(), "does not exist"),
        (damaged(lambda state: state.pop("lambda_mlp.64.bias_in")), "lacks lambda_mlp.64.bias_in"),
        (damaged(lambda state: state.update(more=torch.ones(1))), r"no place for: \['more'\]"),
        (damaged(lambda state: state["lambda_mlp.64.bias_in"].fill_(float("nan"))), "holds NaN"),
        (damaged(lambda state: state["lambda_mlp.64.bias_in"].fill_(1e9)), "as float16: .* infinite"),
    ],
)
def test_nothing_is_left_of_an_export_that_fails(tmp_path, damage, message):
    saved(tmp_path / "run", adapter_dtype="float32")
    damage(tmp_path / "run")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export_adapter(tmp_path / "run", tmp_path / "out", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_full_disk(tmp_path, monkeypatch):
    def fails(state, path, **kwargs):
        path.write_bytes(b"half")
        raise SafetensorError("no space left")

    saved(tmp_path / "run")
    monkeypatch.setattr(export, "save_file", fails)
    with pytest.raises(OSError, match="could not be written to .*out: no space left"):
        export_adapter(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_is_there_is_not_overwritten(tmp_path):
    saved(tmp_path / "run")
    for name in ("run", f"run/{CONFIG_NAME}"):
        with pytest.raises(FileExistsError, match="already exists: give a new folder"):
            export_adapter(tmp_path / "run", tmp_path / name)
    (tmp_path / "empty").mkdir()
    export_adapter(tmp_path / "run", tmp_path / "empty")
    assert (tmp_path / "empty" / WEIGHTS_NAME).is_file()


def card_of(folder, **files):
    saved(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    export_adapter(folder, folder.parent / "out")
    return (folder.parent / "out" / "README.md").read_text()


def test_the_card_of_a_run(tmp_path):
    report = {"steps": 70, "accuracy_before": 0.39, "accuracy_after": 0.804, "eval_rows": 500, "ranks": []}
    card = card_of(tmp_path / "run", report=report, trainer_state={"global_step": 70, "log_history": []})
    head = card.split("---")[1]
    assert "base_model: acme/base\nbase_model_relation: adapter" in head and "\n# license: choose one" in head
    for text in (
        "at revision `v3`", 'AutoModelForCausalLM.from_pretrained("acme/base", revision="v3")',
        "| accuracy_after | 0.804 |", "| steps | 70 |", "| num_experts | 8 |", "| router | sparsegen |", "2509.25684",
    ):  # fmt: skip
        assert text in card, text
    assert "projection_groups" not in card and "ranks" not in card


def test_the_card_of_a_checkpoint_has_the_results_of_its_own_step(tmp_path):
    history = [{"step": 2, "eval_accuracy": 0.1}, {"step": 4, "loss": 0.5}, {"step": 4, "eval_accuracy": 0.7}]
    card = card_of(tmp_path / "run", trainer_state={"global_step": 4, "log_history": history})
    assert "| steps | 4 |" in card and "| eval_accuracy | 0.7 |" in card and "0.1" not in card.split("## Settings")[0]


@pytest.mark.parametrize("state", ["{", "[1]", '{"global_step": null}'])
def test_the_card_of_an_adapter_without_results(tmp_path, state):
    assert "## Results" not in card_of(tmp_path / "run", trainer_state=state)


def test_the_card_tells_no_local_path():
    card = model_card(
        tiny_config(base_model_name_or_path="/home/me/models/base-7b/", base_model_revision="main"), "mine"
    )
    assert "/home/me" not in card and "base_model:" not in card and '"base-7b"' in card
