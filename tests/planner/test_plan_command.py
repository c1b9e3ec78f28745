"""launch/plan.py: what it prints and writes, and what it refuses."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ldmole_ds.planner import Device, StepCosts, Wire, read_calibration, write_calibration
from ldmole_ds.training.arguments import adapter_config, parse_flags
from ldmole_ds.training.ds_config import check_ds_config, read_ds_config
from ldmole_ds.training.runtime import UserError
from tests.planner.plan_cases import small_hf_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plan():
    spec = importlib.util.spec_from_file_location("launch_plan", ROOT / "launch" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def model_file(tmp_path):
    small_hf_config().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model" / "config.json")


def test_a_plan_as_table_json_config_and_command(plan, model_file, tmp_path, capsys):
    flags = ["--model_name_or_path", model_file, "--bf16", "--r", "4", "--target_modules", "q_proj", "v_proj"]
    out = ["--json", str(tmp_path / "plan.json"), "--write_config", str(tmp_path / "out")]
    batch = ["--per_device_train_batch_size", "2", "--max_length", "32", "--global_batch_size", "32"]
    plan(
        [*flags, *batch, *out, "--nodes", "2", "--gpus_per_node", "4", "--ep_size", "4", "--expert_dispatch", "weights"]
    )
    text = capsys.readouterr().out
    assert "Recommended: ep_size 4, weights" in text and "modelled" in text

    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["schema"] == "ldmole_ds.plan/1" and found["modelled"] and found["world_size"] == 8
    assert found["recommended"]["ep_size"] == 4 and found["batch"]["accumulation"] == 2
    assert {layout["zero_stage"] for layout in found["layouts"]} == {1, 2, 3}
    for layout in found["layouts"]:
        parts = layout["compute_seconds"] + layout["optimizer_seconds"] + layout["communication_seconds"]
        assert layout["step_seconds"] == pytest.approx(parts)
        assert layout["phases"]["gather"]["bytes"] > 0 and layout["memory"]["total"] > 0

    words = shlex.split(text.strip().splitlines()[-1])
    assert words[:7] == ["deepspeed", "--hostfile", "hostfile", "--num_nodes", "2", "--num_gpus", "4"]
    trained = parse_flags(words[words.index("launch/train.py") + 1 :])
    assert (trained.ep_size, trained.expert_dispatch, trained.bf16) == ("4", "weights", True)
    assert (trained.per_device_train_batch_size, trained.gradient_accumulation_steps, trained.max_length) == (2, 2, 32)
    assert trained.model_name_or_path == str(Path(model_file).parent)  # what can be loaded
    assert adapter_config(trained).r == 4 and adapter_config(trained).target_modules == ["q_proj", "v_proj"]
    config = read_ds_config(trained.deepspeed)
    check_ds_config(config, trained.deepspeed)
    assert config["zero_optimization"]["stage"] == found["recommended"]["zero_stage"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ep_size", "3"], "--ep_size 3 must divide 8 ranks and 8 experts"),
        (["--ep_size", "many"], "--ep_size must be auto or a whole number"),
        (["--gpu", "h900"], "--gpu h900 is neither a file from --calibrate nor one of h200, h100"),
        (["--nodes", "0"], "nodes must be at least 1"),
        (["--memory_gb", "-1"], "memory of device must be above 0"),
        (["--global_batch_size", "9"], "not a multiple of 64"),
        (["--bf16", "--fp16"], "exclude each other"),
        (["--model_name_or_path", "/nowhere"], "has no readable configuration"),
        (["--num_experts", "0"], "num_experts must be a whole number of at least 1"),
        (["--preset", "best"], "--preset best is not known"),
        (["--teleport"], "unknown argument --teleport"),
        (["--skew", "0"], "skew at least 1"),
        (["--active_experts", "0"], "active_experts must be above 0"),
        (["--adapter_name_or_path", "runs/one"], "--adapter_name_or_path is not read by the planner: give"),
        (["--trust_remote_code"], "--trust_remote_code is not read by the planner"),
        (["--memory_gb", "0.000001", "--write_config", "unused"], "no layout fits, so nothing was written"),
    ],
)
def test_what_is_wrong_is_one_sentence(plan, model_file, flags, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        plan(["--model_name_or_path", model_file, *flags])


def test_a_calibration_is_read_back_and_others_are_refused(tmp_path):
    path, device, wire = tmp_path / "here.json", Device("d", 1e9, 2e9, 3e9, 4e9, 5e-6, False), Wire(1e-5, 1e8)
    costs = StepCosts(1e-4, 2e-4, 3e-4, {2: 1e-3, 4: 4e-3}, {2: 3e-3}, 2e-8, 1e-8)
    write_calibration(path, device, wire, costs)
    assert read_calibration(path) == {"device": device, "inside": wire, "between": wire, "costs": costs}
    old = json.loads(path.read_text())
    del old["costs"]
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="without what a training step costs: write it anew with --calibrate"):
        read_calibration(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no calibration .*--calibrate FILE"):
        read_calibration(path)


def test_the_machine_is_measured(tmp_path):
    """In a process of its own, which brings its communication up."""
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), "--calibrate", str(tmp_path / "here.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    device = read_calibration(tmp_path / "here.json")["device"]
    assert device.float_flops > 1e8 and device.bandwidth > 1e7 and 0 < device.op_seconds < 0.01
    assert device.grouped_speed == 1.0  # one thread
    assert "GFLOPS" in done.stdout and "calibrating: products" in done.stdout
