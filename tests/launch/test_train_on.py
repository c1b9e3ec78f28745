"""Train on from an adapter through the real launcher, in another layout than it was saved in."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ldmole_ds import LDMoLEConfig, get_ldmole_model
from ldmole_ds.config import CONFIG_NAME, WEIGHTS_NAME
from ldmole_ds.model.base_model import load_base_model
from tests.launcher import launch
from tests.tiny import wake_experts


@pytest.fixture
def adapter(tiny_model_folder, tmp_path):
    """Written by one process, with awake experts; other settings than the command line's defaults."""
    config = LDMoLEConfig(
        num_experts=4, r=2, lambda_hidden_size=16, router="sparsegen", base_model_name_or_path=str(tiny_model_folder)
    )
    model = get_ldmole_model(load_base_model(str(tiny_model_folder)), config)
    wake_experts(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_a_run_starts_from_the_adapter_under_zero3_and_ep_2(adapter, data_folder, tmp_path):
    """At learning rate 0 what is saved is what was loaded, bit for bit."""
    flags = {
        "adapter_name_or_path": adapter,
        "train_file": data_folder / "train.jsonl",
        "output_dir": tmp_path / "out",
        "deepspeed": "ds_configs/zero3.json",
        "ep_size": 2,
        "max_steps": 1,
        "learning_rate": 0,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "lora_dropout": 0.05,
    }
    result = launch(*(part for key, value in flags.items() for part in (f"--{key}", value)))
    assert result.returncode == 0, result.stdout[-4000:]
    assert f"start     the weights of {adapter}" in result.stdout and "(2 of 4)" in result.stdout
    before, after = load_file(adapter / WEIGHTS_NAME), load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert (config["num_experts"], config["r"], config["lora_dropout"]) == (4, 2, 0.05)
    record = json.loads((tmp_path / "out" / "run_settings.json").read_text())
    assert record["model"]["adapter_name_or_path"] == str(adapter)
