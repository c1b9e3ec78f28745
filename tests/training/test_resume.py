"""Stopping and resuming in the same layout changes nothing, bit for bit."""

import os
from pathlib import Path

import pytest
import torch

from ldmole_ds.model.adapter_io import gather_adapter_state
from tests.distributed_utils import run_distributed
from tests.training.trainer_runs import make_trainer, rows

STEPS, SAVED_AT = 5, 2
SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
    "save_total_limit": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "train_sampling_strategy": "random",
    "label_smoothing_factor": 0.0,
}
CASES = [(stage, ep_size) for stage in (1, 2, 3) for ep_size in (1, 2)]


def outcome(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "grad_norm" in entry}
    return {
        "curve": {s: (e["loss"], e["grad_norm"], e["learning_rate"]) for s, e in logs.items() if s > SAVED_AT},
        "state": gather_adapter_state(trainer.model),
        "steps": trainer.state.global_step,
    }


def build(folder, stage, ep_size, accumulation, **changes):
    config = None
    if stage is not None:
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    values = {**SETTINGS, **changes, "output_dir": folder}
    values = {"lora_dropout": 0.1, **values}
    return make_trainer(values.pop("micro", 2), accumulation, config, ep_size, in_order=False, **values)


def resume_on_ranks(rank, world_size, folder):
    """For every case: the whole run, and a run that begins at its checkpoint."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    results = {}
    for stage, ep_size in CASES:
        place = f"{folder}/{stage}-{ep_size}"
        AcceleratorState._reset_state()
        torch.manual_seed(rank)
        # Saved at steps 2 and 4; the limit keeps one, so the copy that is resumed from is made of the first.
        whole = outcome(build(place, stage, ep_size, 2, save_total_limit=None))
        AcceleratorState._reset_state()
        torch.manual_seed(99)  # the random state comes from the checkpoint
        again = outcome(build(f"{place}-again", stage, ep_size, 2), f"{place}/checkpoint-{SAVED_AT}")
        results[stage, ep_size] = (whole, again)
    return results


def cross_on_ranks(rank, world_size, folder):
    """One whole run, and runs that begin at its checkpoint in every other layout of these ranks."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    # Rows in order and no dropout: everything else is as in the exact runs.
    settings = {"train_sampling_strategy": "sequential", "lora_dropout": 0.0, "save_total_limit": None}
    whole = outcome(build(f"{folder}/whole", 2, 2, 2, **settings))
    results = {}
    for stage, ep_size in CASES:
        AcceleratorState._reset_state()
        trainer = build(f"{folder}/{stage}-{ep_size}", stage, ep_size, 2, **settings)
        results[stage, ep_size] = outcome(trainer, f"{folder}/whole/checkpoint-{SAVED_AT}")
    return whole, results


def best_on_ranks(rank, world_size, folder):
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    results = []
    for stage, ep_size in ((2, 2), (3, 1), (3, 2)):
        AcceleratorState._reset_state()
        results.append(best_model(f"{folder}/best-{stage}-{ep_size}", stage, ep_size))
    return results


def assert_same(whole, again):
    assert whole["steps"] == again["steps"] == STEPS
    assert list(whole["curve"]) == list(range(SAVED_AT + 1, STEPS + 1))
    assert again["curve"] == whole["curve"]
    assert again["state"].keys() == whole["state"].keys()
    assert all(torch.equal(again["state"][key], whole["state"][key]) for key in whole["state"])


@pytest.mark.distributed
def test_every_stage_resumes_bit_for_bit(tmp_path):
    per_rank = run_distributed(resume_on_ranks, 2, str(tmp_path), deepspeed=True, timeout_s=300)
    for results in per_rank:
        assert set(results) == set(CASES)
        for whole, again in results.values():
            assert_same(whole, again)


def assert_close(whole, again):
    assert list(again["curve"]) == list(whole["curve"])
    for step, values in whole["curve"].items():
        assert again["curve"][step] == pytest.approx(values, rel=1e-5), step


@pytest.mark.distributed
def test_the_trainer_goes_on_in_other_layouts(tmp_path):
    per_rank = run_distributed(cross_on_ranks, 2, str(tmp_path), deepspeed=True, timeout_s=300)
    whole, results = per_rank[0]
    assert set(results) == set(CASES)
    for again in results.values():
        assert_close(whole, again)
    # And in one process, without DeepSpeed: the same eight rows a step, in as many micro-steps.
    settings = {"train_sampling_strategy": "sequential", "lora_dropout": 0.0, "micro": 4}
    alone = build(str(tmp_path / "alone"), None, 1, 2, **settings)
    assert_close(whole, outcome(alone, str(tmp_path / f"whole/checkpoint-{SAVED_AT}")))


# The rate is halved at each evaluation, since none is better than the last by so much.
ON_PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "threshold": 0.9},
    "eval_strategy": "steps",
    "eval_steps": 1,
    "warmup_steps": 0,
}


@pytest.mark.parametrize("changes", [{}, {"train_sampling_strategy": "group_by_length"}, ON_PLATEAU])
def test_one_process_without_deepspeed_resumes_bit_for_bit(tmp_path, changes):
    changes = {"eval_dataset": rows(), **changes}
    whole = outcome(build(str(tmp_path / "a"), None, 1, 2, save_total_limit=None, **changes))
    again = outcome(build(str(tmp_path / "b"), None, 1, 2, **changes), str(tmp_path / f"a/checkpoint-{SAVED_AT}"))
    assert_same(whole, again)
    rates = [rate for _, _, rate in whole["curve"].values()]
    assert rates == sorted(set(rates), reverse=True)


def test_the_limit_keeps_the_newest_and_the_best(tmp_path):
    trainer = build(str(tmp_path), None, 1, 1, save_steps=1)
    trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


BEST = {
    "save_steps": 1,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the worst one, which is not the last
    "learning_rate": 1e-2,
}


def best_model(folder, stage, ep_size):
    trainer = build(folder, stage, ep_size, 1, eval_dataset=rows(), **BEST)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    kept = {p.name for p in Path(folder).glob("checkpoint-*")}
    return Path(trainer.state.best_model_checkpoint).name, losses, trainer.evaluate()["eval_loss"], kept


def assert_best(best, losses, after, kept):
    assert best != f"checkpoint-{STEPS}"
    assert after == losses[int(best.split("-")[1])] == max(losses.values())
    assert kept == {best, f"checkpoint-{STEPS}"}


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    assert_best(*best_model(str(tmp_path), None, 1))


@pytest.mark.distributed
def test_the_best_model_is_loaded_under_zero(tmp_path):
    for results in run_distributed(best_on_ranks, 2, str(tmp_path), deepspeed=True, timeout_s=300):
        for result in results:
            assert_best(*result)
