"""examples/plain_loop.py: the same adapter at every ZeRO stage and ep_size, stage 0 refused, and a clean end."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from ldmole_ds import LDMoLEModel
from ldmole_ds.model.adapter_io import read_state
from ldmole_ds.model.base_model import load_base_model
from tests.distributed_utils import run_distributed
from tests.launcher import launch
from tests.tiny import ragged_batch

LAYOUTS = [(1, 0), (1, 2), (2, 1), (2, 2), (2, 3)]  # ep_size, stage
STEPS = 3


def loop_on_ranks(rank: int, world_size: int, model: str, folder: str) -> str:
    """The example's loop in every layout; returns what partitioned experts get at stage 0."""
    from examples import plain_loop

    # With fewer rows some element's gradient is no larger than its rounding, and Adam makes a whole step of it.
    values = {"model_name_or_path": model, "steps": STEPS, "batch_size": 6}
    for ep_size, stage in LAYOUTS:
        torch.manual_seed(rank)  # for dropout
        plain_loop.train(Namespace(**values, ep_size=ep_size, stage=stage, output_dir=f"{folder}/{ep_size}-{stage}"))
    try:
        plain_loop.train(Namespace(**values, ep_size=2, stage=0, output_dir=f"{folder}/refused"))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_every_layout_trains_the_same_adapter_and_stage_0_is_refused(tiny_model_folder, tmp_path):
    job = (str(tiny_model_folder), str(tmp_path))
    refusals = run_distributed(loop_on_ranks, 2, *job, deepspeed=True, timeout_s=400)
    for refusal in refusals:
        assert refusal.startswith("ep_size=2 with ZeRO stage 0 would clip gradients wrongly and lose experts on save: ")
        assert refusal.endswith("set zero_optimization.stage to 1, 2 or 3, or use ep_size=1") and "\n" not in refusal
    assert not (tmp_path / "refused").exists()
    states = [read_state(tmp_path / f"{ep}-{stage}" / "adapter_model.safetensors") for ep, stage in LAYOUTS]
    start = loaded(tiny_model_folder, tmp_path / "1-0")
    for layout, state in zip(LAYOUTS[1:], states[1:], strict=True):
        assert state.keys() == states[0].keys()
        for key, expected in states[0].items():
            assert (state[key] - expected).norm() <= 1e-5 * expected.norm(), (layout, key)
    assert all(len(value) == 8 and value.norm() > 0 for key, value in states[0].items() if key.endswith("lora_B"))
    assert start.adapter_config.num_experts == 8


def loaded(model_folder, adapter_folder) -> LDMoLEModel:
    return LDMoLEModel.from_pretrained(load_base_model(str(model_folder)), adapter_folder)


@pytest.mark.slow
def test_the_command_ends_cleanly_and_its_adapter_loads(tiny_model_folder, tmp_path):
    flags = ("--model_name_or_path", tiny_model_folder, "--steps", STEPS, "--output_dir", tmp_path)
    result = launch(*flags, script="examples/plain_loop.py")
    assert result.returncode == 0, result.stdout[-4000:]
    assert result.stdout.count("exits successfully") == 2
    losses = [float(line.split()[3]) for line in result.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    batch = ragged_batch()
    with torch.no_grad():
        bare = load_base_model(str(tiny_model_folder))(**batch).logits
        assert not torch.equal(loaded(tiny_model_folder, tmp_path)(**batch).logits, bare)
