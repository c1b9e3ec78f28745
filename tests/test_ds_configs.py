"""Every file in ds_configs/ is one that DeepSpeed accepts and that the Trainer can fill."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
HIDDEN_SIZE = 64


def load(path):
    return json.loads(path.read_text())


def paths_of_auto(value, path=""):
    if value == "auto":
        return [path]
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in paths_of_auto(inner, f"{path}.{key}".lstrip("."))]
    return []


def filled_by_trainer(path):
    """The config as the Trainer hands it on. What a file fixes is given on the command line too, as users must."""
    config = load(path)
    args = SimpleNamespace(
        world_size=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.3,
        learning_rate=1e-4,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.1,
        save_on_each_node=False,
        fp16=config.get("fp16", {}).get("enabled") is True,
        fp16_full_eval=False,
        bf16=config.get("bf16", {}).get("enabled") is True,
        bf16_full_eval=False,
        get_warmup_steps=lambda num_training_steps: 0,
    )
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=HIDDEN_SIZE))
    try:
        hf_config = HfTrainerDeepSpeedConfig(config)
        hf_config.trainer_config_process(args)
        hf_config.trainer_config_finalize(args, model, num_training_steps=10)
    finally:
        unset_hf_deepspeed_config()
    return hf_config.config


def test_folder_holds_what_the_readme_lists():
    readme = (FOLDER / "README.md").read_text()
    assert FILES
    assert [path.name for path in FILES if f"`{path.name}`" not in readme] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trainer_fills_every_auto(path):
    config = filled_by_trainer(path)
    assert paths_of_auto(config) == []
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["train_batch_size"] == 8
    assert config["gradient_clipping"] == 0.3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_accepts_it(path):
    stem = path.stem
    parsed = DeepSpeedConfig(filled_by_trainer(path))
    assert parsed.train_batch_size == 8
    assert parsed.gradient_clipping == 0.3
    assert parsed.zero_optimization_stage == int(stem.removeprefix("zero")[0])
    assert parsed.bfloat16_config.enabled == stem.endswith("_bf16")
    assert parsed.float16_config.enabled == stem.endswith("_fp16")
    assert (parsed.zero_config.offload_optimizer is not None) == stem.endswith("_offload")
    assert parsed.zero_config.offload_param is None
    # The Trainer's AdamW is kept: no optimizer here, and no swap for the compiled CPU Adam under offload.
    assert parsed.optimizer_name is None
    assert parsed.zero_force_ds_cpu_optimizer != stem.endswith("_offload")


def test_an_auto_that_nobody_fills_is_noticed(tmp_path):
    config = load(FOLDER / "zero2.json")
    config["zero_optimization"]["allgather_bucket_size"] = "auto"
    (tmp_path / "planted.json").write_text(json.dumps(config))
    assert paths_of_auto(filled_by_trainer(tmp_path / "planted.json")) == ["zero_optimization.allgather_bucket_size"]
