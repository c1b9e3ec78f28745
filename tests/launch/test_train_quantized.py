"""``--quantization`` from the command line: train on two ranks, save a checkpoint, load the adapter and answer."""

import json
import subprocess
import sys

import pytest

from ldmole_ds.checkpoint import TrainingState
from ldmole_ds.training.arguments import parse_flags
from ldmole_ds.training.run import train
from ldmole_ds.training.runtime import UserError
from tests.launcher import ROOT, launch

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")


@pytest.fixture
def flags(tiny_model_folder, data_folder, tmp_path):
    return {
        "model_name_or_path": tiny_model_folder,
        "train_file": data_folder / "train.jsonl",
        "validation_file": data_folder / "test.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "lambda_hidden_size": 16,
        "save_strategy": "no",
        "deepspeed": "ds_configs/zero2.json",
    }


def argv(flags: dict) -> list[str]:
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


@pytest.mark.slow
def test_nf4_on_two_ranks(flags):
    result = launch(*argv({**flags, "quantization": "nf4", "save_strategy": "steps", "save_steps": 2}))
    assert result.returncode == 0, result.stdout[-4000:]
    folder = flags["output_dir"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_quantization"] == "nf4"
    assert "experts 4-7 (4 of 8)" in result.stdout and "MatMul" not in result.stdout
    saved = {key.rsplit(".", 1)[-1] for key in TrainingState(folder / "checkpoint-2").shapes if ".layers." in key}
    assert saved == {"lora_A", "lora_B", "router"}, "the base must not be in a checkpoint"
    command = [sys.executable, "launch/generate.py", "--adapter", str(folder), "--classify", "--prompt", "pay a bill"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0 and "%" in answer.stdout, answer.stderr[-2000:]


@pytest.mark.slow
def test_int8_in_one_process_without_deepspeed(flags):
    flags.pop("deepspeed")
    command = [sys.executable, "launch/train.py", *argv({**flags, "quantization": "int8"})]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert (flags["output_dir"] / "adapter_model.safetensors").is_file()


def test_an_unknown_kind_is_refused(flags):
    with pytest.raises(UserError, match="--quantization: invalid choice: 'fp4'"):
        train(parse_flags(argv({**flags, "quantization": "fp4"})))
