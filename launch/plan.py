#!/usr/bin/env python
"""Plan a run before paying for it: memory, bytes and time of every layout, from the model's configuration alone.

    python launch/plan.py --model_name_or_path meta-llama/Llama-3.1-8B --nodes 2 --gpus_per_node 8 --gpu h100 --bf16
    python launch/plan.py ... --json plan.json --write_config runs/planned
    python launch/plan.py --calibrate here.json                                     measures this machine
    torchrun --nproc_per_node 2 launch/plan.py --calibrate here.json                with the link and expert parallelism

No weights are read and no accelerator is needed. Model, adapter and batch flags are those of launch/train.py; an
adapter to train on from is planned by its settings.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.plan_flags import parse_flags  # noqa: E402
from ldmole_ds.training.runtime import UserError, is_main_process, run_main  # noqa: E402

USABLE_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Flags of training that would change the plan, but cannot be followed here.
UNREAD = {
    "adapter_name_or_path": "give the settings in its adapter_config.json (--num_experts, --r, ...)",
    "trust_remote_code": "a model with code of its own cannot be planned",
}


def build_cluster(flags: Namespace):
    """The cluster, with what the flags say instead of the preset."""
    from ldmole_ds.planner import PRESETS, Cluster, read_calibration

    found = dict(
        PRESETS[flags.gpu] if flags.gpu in PRESETS else _calibrated(flags.gpu, list(PRESETS), read_calibration)
    )
    given = {"memory": (flags.memory_gb, 1e9), "half_flops": (flags.tflops, 1e12)}
    found["device"] = _changed(found["device"], given)
    for name, wire in (("inside", "intra"), ("between", "inter")):
        latency, bandwidth = getattr(flags, f"{wire}_latency_us"), getattr(flags, f"{wire}_bandwidth_gbs")
        found[name] = _changed(found[name], {"latency": (latency, 1e-6), "bandwidth": (bandwidth, 1e9)})
    return Cluster(nodes=flags.nodes, ranks_per_node=flags.gpus_per_node, **found)


def _calibrated(name: str, presets: list[str], read) -> dict:
    if not Path(name).is_file():
        raise ValueError(f"--gpu {name} is neither a file from --calibrate nor one of {', '.join(presets)}")
    return read(name)


def _changed(thing, given: dict):
    values = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} of {type(thing).__name__.lower()} must be above 0, got {value:g}")
    return dataclasses.replace(thing, **values)


def build_job(flags: Namespace):
    """The job and its layouts, estimated."""
    import torch

    from ldmole_ds.model.dispatch_plan import expected_experts
    from ldmole_ds.planner import (
        Batch,
        Job,
        Precision,
        Routing,
        kind_of,
        layouts,
        load_config,
        shape_of_config,
        trace_step,
    )
    from ldmole_ds.tasks import demo_model_file
    from ldmole_ds.training.arguments import adapter_config
    from ldmole_ds.training.batch import BatchArguments, accumulation_steps

    for name, remedy in UNREAD.items():
        if getattr(flags, name):
            raise ValueError(f"--{name} is not read by the planner: {remedy}")
    if flags.bf16 and flags.fp16:
        raise ValueError("--bf16 and --fp16 exclude each other: give one")
    cluster, config = build_cluster(flags), adapter_config(flags)
    if flags.ep_size != "auto" and not flags.ep_size.isdigit():
        raise ValueError(f"--ep_size must be auto or a whole number of at least 1, got {flags.ep_size!r}")
    ep_size = None if flags.ep_size == "auto" else int(flags.ep_size)
    micro = flags.per_device_train_batch_size
    steps = accumulation_steps(
        BatchArguments(flags.global_batch_size), micro, flags.gradient_accumulation_steps, cluster.world_size
    )
    batch = Batch(micro, flags.max_length, steps)
    plans = layouts(
        cluster,
        config.num_experts,
        ep_size=ep_size,
        dispatch=None if flags.expert_dispatch == "auto" else flags.expert_dispatch,
        zero_stage=flags.zero_stage,
        checkpointing=flags.activation_checkpointing,
        chunk_tokens=flags.dispatch_chunk_tokens,
    )
    source = flags.model_name_or_path or str(demo_model_file())
    hf_config = load_config(source, revision=flags.revision, token=flags.token)
    engine = "bfloat16" if flags.bf16 else "float16" if flags.fp16 else "float32"
    base = engine if engine != "float32" else flags.dtype
    if base == "auto":
        base = str(getattr(hf_config, "dtype", None) or "float32").removeprefix("torch.")
    config.adapter_dtype = config.adapter_dtype or engine
    shape = shape_of_config(hf_config, config)
    precision = Precision(USABLE_DTYPES[base], USABLE_DTYPES[config.adapter_dtype], flags.quantization)
    active = expected_experts(config) if flags.active_experts is None else flags.active_experts
    routing = Routing(active, flags.skew)
    traced = {"micro": micro, "length": flags.max_length, "dtype": getattr(torch, base)}
    kinds = {kind_of(layout, cluster.device, precision) for layout in plans}
    traces = {kind: trace_step(hf_config, config, kind, **traced) for kind in kinds}
    job = Job(shape, cluster, batch, precision, routing, traces)
    return job, [job.estimate(layout) for layout in plans]


def write_config(job, best, flags: Namespace, argv: list[str]) -> str:
    """ds_config.json for the layout; returns the launch command."""
    from ldmole_ds.planner import launch_command

    folder = Path(flags.write_config)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / "ds_configs" / f"zero{best.layout.zero_stage}.json").read_text(encoding="utf-8"))
    (folder / "ds_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return launch_command(job, best, str(folder / "ds_config.json"), training_flags(argv))


def training_flags(argv: list[str]) -> list[str]:
    """The flags among these that mean the same in training: model, adapter, precision."""
    from ldmole_ds.training.argument_groups import AdapterArguments, ModelArguments

    names = {f.name for group in (ModelArguments, AdapterArguments) for f in dataclasses.fields(group)}
    kept, keep = [], False
    for word in argv:
        if word.startswith("--"):
            keep = word[2:].split("=")[0] in names | {"bf16", "fp16"}
        if keep:
            # Training loads a folder; the planner reads its config.json as well.
            kept.append(str(Path(word).parent) if Path(word).name == "config.json" else word)
    return kept


def calibrate_here(path: str) -> None:
    """Measure, and write the file on rank 0."""
    import torch
    import torch.distributed as dist

    from ldmole_ds.planner import write_calibration
    from ldmole_ds.planner.calibrate import measure
    from ldmole_ds.planner.solve import describe, solve
    from ldmole_ds.training.ranks import single_process
    from ldmole_ds.training.run import quiet_libraries
    from ldmole_ds.training.runtime import ranks_of_job, stop

    Path(path).parent.mkdir(parents=True, exist_ok=True)  # before the time is spent
    ranks = ranks_of_job() or single_process()
    os.environ.update(ranks.environment())
    quiet_libraries()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
        device = torch.device("cuda", ranks.local_rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = functools.partial(print, "calibrating:", flush=True) if is_main_process() else lambda text: None
    found = solve(measure(device, say))
    if is_main_process():
        write_calibration(path, found.device, found.wire(), found.costs)
        print(f"{describe(found)}; written to {path}")
    stop()


def main(argv: list[str]) -> None:
    from ldmole_ds.planner import plan_dict, plan_text, recommend

    flags = parse_flags(argv, __doc__)
    try:
        if flags.calibrate:
            calibrate_here(flags.calibrate)
            return
        job, estimates = build_job(flags)
        print(plan_text(job, estimates))
        best = recommend(job, estimates)[0]
        if flags.json:
            Path(flags.json).write_text(json.dumps(plan_dict(job, estimates), indent=2) + "\n", encoding="utf-8")
        if flags.write_config:
            if best is None:
                raise ValueError("--write_config: no layout fits, so nothing was written")
            print("\n" + write_config(job, best, flags, argv))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    run_main(main)
