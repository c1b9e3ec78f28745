"""The adapter on disk: what goes in comes out, and what cannot be right is refused with a reason."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ldmole_ds.config import CONFIG_NAME, WEIGHTS_NAME
from ldmole_ds.model import LDMoLEModel, adapter_io, get_ldmole_model
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

ROOT = Path(__file__).resolve().parents[2]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def logits(model):
    return model.eval()(**ragged_batch()).logits.detach()


def other_llama(**changes):
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**values, "num_key_value_heads": 2, "vocab_size": 128, **changes}))


@pytest.fixture
def folder(tmp_path):
    """A saved adapter."""
    tiny_model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "sparsegen"},
        {"router": "sparsegen", "lambda_sharing": "per_layer"},
        {"router": "sparsegen_fixed", "fixed_lambda": -1.5},
        {"router": "softmax", "input_groups": "single"},
        {"router": "topk", "topk": 3},
        {"router": "lora"},
    ],
)
def test_round_trip(tmp_path, changes):
    model = tiny_model(tiny_config(**changes))
    model.save_pretrained(tmp_path)
    loaded = LDMoLEModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(tiny_llama())), "the adapter must make a difference"
    assert loaded.adapter_config == model.adapter_config and not loaded.training


def test_the_canonical_form(folder):
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    state, model = load_file(folder / WEIGHTS_NAME), tiny_model()
    # 14 projections with A, B and router; lambda MLPs for the widths 64 and 96 with four tensors each.
    assert len(state) == 14 * 3 + 2 * 4
    # q: 64 to 64, k: 64 to 32; E = 8, r = 4.
    k_proj = Q_PROJ.replace("q_proj", "k_proj")
    shapes = {"lora_A": (8, 4, 64), "lora_B": (8, 32, 4), "router": (8, 64)}
    assert {key: tuple(state[f"{k_proj}.{key}"].shape) for key in shapes} == shapes
    group = model.input_groups[0]
    assert torch.equal(state[f"{k_proj}.lora_A"], group.lora_A[1])
    assert torch.equal(state[f"{k_proj}.lora_B"], group.lora_B[1].transpose(1, 2))
    assert torch.equal(state[f"{k_proj}.router"], group.gate[1])
    assert torch.equal(state["lambda_mlp.64.weight_in"], group.lambda_mlp.weight_in)


@pytest.mark.parametrize(
    ("names", "tied"), [(["lm_head"], False), (["lm_head"], True), (["model.norm", "o_proj"], False)]
)
def test_modules_to_save(tmp_path, names, tied):
    config = tiny_config(modules_to_save=names)
    torch.manual_seed(1)
    base = other_llama(tie_word_embeddings=tied)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_ldmole_model(base, config)
    trained = [p for p in model.base_model.parameters() if p.requires_grad]
    assert len(trained) == (3 if "o_proj" in names else 1)
    with torch.no_grad():
        for param in trained:
            param.add_(torch.randn_like(param))
    model.save_pretrained(tmp_path)
    fresh = other_llama(tie_word_embeddings=tied)
    fresh.load_state_dict(start)
    unchanged = logits(fresh)
    loaded = LDMoLEModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), unchanged)


def test_loading_needs_neither_deepspeed_nor_accelerate(folder, tmp_path):
    expected = tmp_path / "logits.safetensors"
    save_file({"logits": logits(tiny_model())}, expected)
    script = f"""
import sys
sys.modules["deepspeed"] = sys.modules["accelerate"] = None
import torch
from safetensors.torch import load_file
from ldmole_ds import LDMoLEModel
from tests.tiny import ragged_batch, tiny_llama
model = LDMoLEModel.from_pretrained(tiny_llama(), {str(folder)!r})
batch = ragged_batch()
assert torch.equal(model(**batch).logits, load_file({str(expected)!r})["logits"])
assert model.generate(batch["input_ids"][:1], max_new_tokens=2, pad_token_id=0).shape[0] == 1
assert sys.modules["deepspeed"] is None and sys.modules["accelerate"] is None
print("loaded")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["loaded"]


def refused(folder, base=None):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        LDMoLEModel.from_pretrained(base or tiny_llama(), folder)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_missing_files(folder, tmp_path):
    message = refused(tmp_path / "nowhere")
    assert message.startswith("FileNotFoundError") and "give the folder that holds" in message
    (folder / WEIGHTS_NAME).unlink()
    assert f"{WEIGHTS_NAME} does not exist" in refused(folder)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_damaged_file(folder, size):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:size])
    assert "is damaged or not a safetensors file" in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{Q_PROJ}.lora_B"), f"lacks {Q_PROJ}.lora_B"),
        (lambda state: state.pop("lambda_mlp.64.bias_out"), "lacks lambda_mlp.64.bias_out"),
        (
            lambda state: state.update(extra=torch.zeros(1)),
            "holds tensors that its settings have no place for: ['extra']",
        ),
        (
            lambda state: state.update({f"{Q_PROJ}.router": torch.zeros(4, 64)}),
            f"{Q_PROJ}.router has shape (4, 64), expected (8, 64)",
        ),
    ],
)
def test_wrong_tensors(folder, change, message):
    state = load_file(folder / WEIGHTS_NAME)
    change(state)
    save_file(state, folder / WEIGHTS_NAME)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LD_MOLE", ', "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"peft_type": "LORA", "r": 8}', "describes a 'LORA' adapter, not LD_MOLE"),
        ('{"peft_type": "LD_MOLE", "shiny": 1}', "unknown adapter settings ['shiny']"),
        ('{"peft_type": "LD_MOLE", "r": 0}', "r must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_configurations(folder, text, message):
    (folder / CONFIG_NAME).write_text(text)
    assert message in refused(folder)


def test_an_adapter_for_another_base_model(folder):
    assert "(7 in all)" in refused(folder, other_llama(num_hidden_layers=3))
    assert "has shape (8, 4, 64), expected (8, 4, 32)" in refused(folder, other_llama(hidden_size=32))


def fails_half_way(error):
    def save(state, path, **kwargs):
        path.write_bytes(b"half a file")
        raise error

    return save


# safetensors has an error class of its own for a full disk.
@pytest.mark.parametrize("error", [OSError("no space left"), SafetensorError("I/O error: no space left")])
def test_a_failed_save_leaves_the_old_adapter_and_no_temporary_file(folder, monkeypatch, error):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(adapter_io, "save_file", fails_half_way(error))
    with pytest.raises(OSError, match="the adapter could not be saved in .*no space left"):
        tiny_model(tiny_config(router="softmax")).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_replaces_what_was_there(folder):
    model = tiny_model(tiny_config(router="softmax"))
    model.save_pretrained(folder)
    assert json.loads((folder / CONFIG_NAME).read_text())["router"] == "softmax"
    assert torch.equal(logits(LDMoLEModel.from_pretrained(tiny_llama(), folder)), logits(model))


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "adapter").write_text("")
    with pytest.raises(OSError, match="could not be saved"):
        tiny_model().save_pretrained(tmp_path / "adapter")
