"""Adapters that no training can have written are refused with one sentence, and no pickle is ever opened."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmole_ds.config import WEIGHTS_NAME, LDMoLEConfig
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.adapter_checks import check_against_config
from ldmole_ds.model.adapter_io import gather_adapter_state, read_adapter
from tests.tiny import tiny_config, tiny_llama, tiny_model

Q_PROJ = "model.layers.0.self_attn.q_proj"
L1 = "adaptive_l1.exponent"


def nan_at_the_end(state):
    state["lambda_mlp.96.weight_in"].view(-1)[-1] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan_at_the_end, "lambda_mlp.96.weight_in holds NaN or infinite values: take an earlier checkpoint"),
        (lambda s: s[f"{Q_PROJ}.router"].fill_(float("-inf")), f"{Q_PROJ}.router holds NaN or infinite"),
        (lambda s: s.update({f"{Q_PROJ}.lora_A": s[f"{Q_PROJ}.lora_A"].int()}), "is int32, not float32 or bfloat16"),
        (lambda s: s.update({f"{Q_PROJ}.lora_A": s[f"{Q_PROJ}.lora_A"].double()}), "is float64, not float32"),
        (lambda s: s.pop(f"{Q_PROJ}.lora_B"), f"lacks {Q_PROJ}.lora_B"),
        (lambda s: s.update(extra=torch.zeros(1)), "no place for: ['extra']"),
        (lambda s: s.update({f"{Q_PROJ}.lora_B": torch.zeros(8, 64, 0)}), "has no values (shape (8, 64, 0))"),
    ],
)
def test_tensors_are_checked_before_the_base_is_touched(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS_NAME)
    change(state)
    save_file(state, tmp_path / WEIGHTS_NAME)
    base = tiny_llama()
    with pytest.raises(ValueError) as caught:
        LDMoLEModel.from_pretrained(base, tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    LDMoLEModel.from_pretrained(base, _good(tmp_path / "good"))  # refused if it had experts already


def _good(folder):
    tiny_model().save_pretrained(folder)
    return folder


class Opened:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_read(tmp_path):
    folder = _good(tmp_path / "adapter")
    for name in ("adapter_model.bin", "training_args.bin", "rng_state.pth", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
    LDMoLEModel.from_pretrained(tiny_llama(), folder)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.bin, which is a pickle and is never read.*save_pretr"):
        LDMoLEModel.from_pretrained(tiny_llama(), folder)
    assert not (tmp_path / "opened").exists()


CONFIGS = [
    {},
    {"lambda_sharing": "per_layer"},
    {"router": "softmax", "input_groups": "single"},
    {"router": "relu"},
    {"router": "lora"},
    {"router": "topk", "experts_per_layer": [2, 4]},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "down_proj"]},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_what_is_saved_fits_its_settings(tmp_path, changes):
    tiny_model(tiny_config(**changes)).save_pretrained(tmp_path)
    check_against_config(LDMoLEConfig.from_pretrained(tmp_path), read_adapter(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        ({}, lambda s: s.pop(f"{Q_PROJ}.lora_A"), f"lacks {Q_PROJ}.lora_A"),
        ({}, lambda s: s.pop("lambda_mlp.96.bias_in"), "lacks lambda_mlp.96.bias_in"),
        ({"router": "relu"}, lambda s: s.pop(L1), f"lacks {L1}"),
        ({}, lambda s: s.update(extra=torch.zeros(1)), "no place for: ['extra']"),
        ({}, lambda s: s.update({L1: torch.zeros((), dtype=torch.int64)}), f"no place for: ['{L1}']"),
        ({}, lambda s: s.update({f"{Q_PROJ}.lora_A": torch.ones(4, 4, 64)}), "(4, 4, 64), expected (8, 4, any)"),
        # k reads what q reads: its width is q's.
        (
            {},
            lambda s: s.update({f"{Q_PROJ.replace('q_', 'k_')}.lora_A": torch.ones(8, 4, 32)}),
            "(8, 4, 32), expected (8, 4, 64)",
        ),
        ({"modules_to_save": ["lm_head"]}, lambda s: s.pop("lm_head.weight"), "lacks the weights of modules_to_save"),
        (
            {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
            lambda s: s.update({"model.layers.0.mlp.up_proj.lora_A": torch.ones(8, 4, 64)}),
            "no place for: ['model.layers.0.mlp.up_proj.lora_A']",
        ),
    ],
)
def test_what_does_not_fit_its_settings(changes, change, message):
    model = tiny_model(tiny_config(**changes))
    state = gather_adapter_state(model)
    change(state)
    with pytest.raises(ValueError) as caught:
        check_against_config(model.adapter_config, state, "here")
    assert message in str(caught.value)
