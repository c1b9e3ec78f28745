"""Every file in ds_configs/ trains: two steps of `LDMoLETrainer` on two ranks, all in one job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed_utils import engine_computes_in, run_distributed

FILES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
HALF = ("bf16", "fp16")
# Each file in its own precision, and two plain ones that take it from the flag.
CASES = [(path.stem, next((name for name in HALF if path.stem.endswith(name)), None)) for path in FILES]
CASES += [("zero1", "bf16"), ("zero3", "fp16")]
DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", None: "torch.float32"}
STEPS, CLIP = 2, 0.05


def train_with_files(rank: int, world_size: int, cases: list[tuple[str, str | None]]) -> list[dict | None]:
    """Of each case: logged losses, the adapter, and what the engine made of the file; None: not on this device."""
    import os

    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    from ldmole_ds.model.adapter_io import gather_adapter_state
    from tests.training.trainer_runs import make_trainer

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    found = []
    for stem, half in cases:
        if half is not None and not engine_computes_in(half):
            found.append(None)
            continue
        AcceleratorState._reset_state()  # one Accelerator with a DeepSpeed plugin per state
        file = next(str(path) for path in FILES if path.stem == stem)
        changes = {"max_steps": STEPS, "max_grad_norm": CLIP, **{name: name == half for name in HALF}}
        trainer = make_trainer(4, 1, file, 1 if stem == "zero0" else 2, **changes)
        trainer.train()
        engine = trainer.deepspeed
        offload = [getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer")]
        found.append(
            {
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                "state": gather_adapter_state(trainer.model),
                "stage": engine.zero_optimization_stage(),
                "clip": engine.gradient_clipping(),
                "batch": (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()),
                "offload": any(offload),
                "dtypes": sorted({str(p.dtype) for p in trainer.model.parameters()}),
            }
        )
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def per_rank() -> list[dict]:
    return [
        dict(zip(CASES, runs, strict=True))
        for runs in run_distributed(train_with_files, 2, CASES, deepspeed=True, timeout_s=600)
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_file_trains(per_rank, case):
    (stem, half), run = case, per_rank[0][case]
    if run is None:
        pytest.skip(f"DeepSpeed does not compute in {half} on this device")
    assert len(run["losses"]) == STEPS and run["losses"] == per_rank[1][case]["losses"]
    assert run["stage"] == int(stem[4]) and run["clip"] == CLIP and run["batch"] == (8, 4)
    assert run["offload"] == stem.endswith("_offload")
    assert run["dtypes"] == [DTYPES[half]]


@pytest.mark.distributed
def test_float32_files_train_alike(per_rank):
    """Stage, offload and partitioned experts change nothing; half precision stays close."""
    expected = per_rank[0]["zero0", None]
    found = {case: run for case, run in per_rank[0].items() if run is not None}
    assert len(found) >= len(FILES) - len(HALF)
    for (stem, half), run in found.items():
        assert run["losses"] == pytest.approx(expected["losses"], rel=5e-3 if half else 1e-5), (stem, half)
        for key, value in expected["state"].items() if not half else ():
            assert torch.linalg.norm(run["state"][key] - value) < 1e-5 * torch.linalg.norm(value), (stem, key)
