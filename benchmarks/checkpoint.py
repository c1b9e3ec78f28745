#!/usr/bin/env python
"""Saving and loading a checkpoint: this package's form against DeepSpeed's, side by side in one run.

    python benchmarks/checkpoint.py --output benchmarks/results/checkpoint.md

Two gloo ranks of this machine train one step of the embedded SmolLM2-135M with 8 experts of rank 8 on every projection,
then save and load in turn. Prints medians with their spread, and the size on disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldmole_ds.training.run_record import versions  # noqa: E402
from tests.distributed_utils import run_distributed  # noqa: E402

KINDS = {
    "DeepSpeed, as it is": "frozen weights included; one layout; nothing flushed or checked",
    "DeepSpeed, without frozen weights": "exclude_frozen_parameters; one layout; nothing flushed or checked",
    "ldmole_ds": "any layout; flushed to disk, SHA-256 of every file",
    "ldmole_ds, files alone": "the same without flushing and checksums",
}


def measure(rank: int, world_size: int, folder: str, stage: int, ep_size: int, repeats: int) -> dict:
    """Seconds to save and to load, and bytes, by kind. Collective."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from ldmole_ds import LDMoLEConfig, get_ldmole_model, ldmole_param_groups
    from ldmole_ds.model.base_model import load_base_model
    from ldmole_ds.model.training_state import load_checkpoint, save_checkpoint, save_state
    from ldmole_ds.tasks import demo_model_file

    path = demo_model_file()
    model = get_ldmole_model(load_base_model(str(path), dtype="float32"), LDMoLEConfig(lora_dropout=0.0), 0, ep_size)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.randint(0, 1000, (1, 16))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()

    def files_alone(place: Path) -> None:
        if rank == 0:
            place.mkdir()
        dist.barrier()
        save_state(model, engine.optimizer, place, engine)

    save = {
        "DeepSpeed, as it is": lambda place: engine.save_checkpoint(str(place)),
        "DeepSpeed, without frozen weights": lambda place: engine.save_checkpoint(
            str(place), exclude_frozen_parameters=True
        ),
        "ldmole_ds": lambda place: save_checkpoint(engine, place),
        "ldmole_ds, files alone": files_alone,
    }
    load = {
        "DeepSpeed, without frozen weights": lambda place: engine.load_checkpoint(str(place), load_module_strict=False),
        "ldmole_ds": lambda place: load_checkpoint(engine, place),
    }
    seconds: dict = {kind: {"save": [], "load": []} for kind in KINDS}
    size: dict = {}

    def timed(action, place: Path) -> float:
        dist.barrier()
        begin = time.perf_counter()
        action(place)
        dist.barrier()
        return time.perf_counter() - begin

    for turn in range(repeats):
        for kind in KINDS:  # side by side, so that a noisy moment hits all
            place = Path(folder) / f"{list(KINDS).index(kind)}-{turn}"
            seconds[kind]["save"].append(timed(save[kind], place))
            size[kind] = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
            if kind in load:
                seconds[kind]["load"].append(timed(load[kind], place))
            if rank == 0:
                shutil.rmtree(place)
            dist.barrier()
    parameters = model.num_parameters_by_kind()
    return {"seconds": seconds, "bytes": size, "parameters": parameters}


def table(found: dict) -> str:
    """Markdown rows, one per kind."""
    lines = ["| form | save, s | load, s | on disk, MB | what it is |", "| --- | --- | --- | --- | --- |"]

    def cell(values: list[float]) -> str:
        if not values:
            return "-"
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    for kind, text in KINDS.items():
        times = found["seconds"][kind]
        size = found["bytes"][kind] / 1e6
        lines.append(f"| {kind} | {cell(times['save'])} | {cell(times['load'])} | {size:.0f} | {text} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--ep_size", type=int, default=2, help="ranks that share one copy of the experts")
    parser.add_argument("--repeats", type=int, default=5, help="times each form is saved and loaded")
    parser.add_argument("--output", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    from benchmarks.checkpoint import measure  # ranks import it by this name

    with tempfile.TemporaryDirectory() as folder:
        setting = (arguments.stage, arguments.ep_size, arguments.repeats)
        found = run_distributed(measure, 2, folder, *setting, deepspeed=True, timeout_s=900)[0]
    parameters = found["parameters"]
    text = "\n\n".join(
        [
            "# Checkpoints",
            f"SmolLM2-135M, 8 experts of rank 8 on every projection: {parameters['trainable'] / 1e6:.1f} M trainable, "
            f"{parameters['base'] / 1e6:.0f} M frozen parameters, float32, AdamW. 2 ranks, ep_size "
            f"{arguments.ep_size}, ZeRO {arguments.stage}. Medians of {arguments.repeats} (least to most), all forms "
            "in turn. Reproduce: `python benchmarks/checkpoint.py`.",
            f"{date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo. "
            + ", ".join(f"{k} {v}" for k, v in versions().items()),
            table(found) + "\n",
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
