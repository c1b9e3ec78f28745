"""A plan for people (tables) and for programs (JSON), and what starts it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from ldmole_ds.planner.communication import EXPERT_PHASES
from ldmole_ds.planner.estimate import Estimate, Job, describe, recommend

SCHEMA = "ldmole_ds.plan/1"
_ROWS = 14


def plan_dict(job: Job, estimates: list[Estimate]) -> dict[str, Any]:
    """Everything, in plain JSON types: bytes and seconds, fastest layout first."""
    best, reason = recommend(job, estimates)
    shape = job.shape
    ep_sizes = sorted({e.layout.ep_size for e in estimates} - {1})
    return {
        "schema": SCHEMA,
        "modelled": True,
        "model": shape.name,
        "parameters": {"trainable": shape.trainable, "frozen": shape.frozen},
        "world_size": job.cluster.world_size,
        "cluster": asdict(job.cluster),
        "batch": asdict(job.batch),
        "precision": asdict(job.precision),
        "routing": asdict(job.routing),
        "crossover_tokens": {str(p): job.crossover(p) for p in ep_sizes},
        "recommended": None if best is None else asdict(best.layout),
        "reason": reason,
        "layouts": [_estimate_dict(job, e) for e in sorted(estimates, key=lambda e: e.step_seconds)],
    }


def _estimate_dict(job: Job, estimate: Estimate) -> dict[str, Any]:
    dense, experts = job.shape.held(estimate.layout.ep_size)
    return {
        **asdict(estimate.layout),
        "trainable_on_this_rank": dense + experts,
        "fits": job.fits(estimate),
        "memory": {**asdict(estimate.memory), "total": estimate.memory.total, "worst": estimate.memory.worst},
        "phases": {name: asdict(phase) for name, phase in estimate.phases.items()},
        "compute_seconds": estimate.compute_seconds,
        "optimizer_seconds": estimate.optimizer_seconds,
        "communication_seconds": estimate.communication_seconds,
        "step_seconds": estimate.step_seconds,
    }


def plan_text(job: Job, estimates: list[Estimate]) -> str:
    """The plan as a few short tables."""
    best, reason = recommend(job, estimates)
    shape, cluster, batch = job.shape, job.cluster, job.batch
    head = [
        f"{shape.name}: {shape.trainable:,} trainable parameters in {len(shape.groups)} input groups, "
        f"{shape.frozen:,} frozen",
        f"{cluster.nodes} x {cluster.ranks_per_node} {cluster.device.name}; {batch.micro} x {batch.length} tokens per "
        f"rank, {batch.accumulation} micro-step(s), {cluster.world_size * batch.micro * batch.accumulation} rows per "
        "optimizer step",
        f"{job.routing.active_experts:g} experts per token expected, fullest rank {job.routing.skew:g} x the mean. "
        "All figures are modelled.",
    ]
    lines = ["", "layout                               GB/rank  worst   s/step  computing  exchange  ZeRO    fits"]
    ranked = sorted(estimates, key=lambda e: (not job.fits(e), e.step_seconds))
    lines += [_row(job, e, e is best) for e in ranked[:_ROWS]]
    if len(ranked) > _ROWS:
        lines.append(f"  ... and {len(ranked) - _ROWS} more (--json has them all)")
    text = [*head, *lines]
    for p in sorted({e.layout.ep_size for e in estimates} - {1})[:6]:
        tokens = job.crossover(p)
        where = "for no batch" if tokens is None else f"from {tokens:,.0f} tokens per rank and micro-step on"
        text.append(f"ep_size {p}: weights moves in less time than tokens {where if tokens != 0 else 'for any batch'}")
    text += ["", f"Recommended: {reason}" if best else reason]
    if best is not None:
        text += ["", _detail(best)]
    return "\n".join(text)


def _row(job: Job, estimate: Estimate, chosen: bool) -> str:
    experts = sum(p.seconds for name, p in estimate.phases.items() if name in EXPERT_PHASES)
    zero = estimate.communication_seconds - experts
    memory, mark = estimate.memory, "*" if chosen else " "
    return (
        f"{mark} {describe(estimate.layout):<34} {memory.total / 1e9:7.1f} {memory.worst / 1e9:6.1f} "
        f"{estimate.step_seconds:8.3f} {estimate.compute_seconds:10.3f} {experts:9.3f} {zero:6.3f}   "
        f"{'yes' if job.fits(estimate) else 'no'}"
    )


def _detail(best: Estimate) -> str:
    memory = " | ".join(f"{name} {value / 1e9:.2f}" for name, value in asdict(best.memory).items() if value)
    phases = " | ".join(
        f"{name} {phase.bytes / 1e6:.1f} MB in {phase.calls:.0f} calls, {phase.seconds * 1e3:.1f} ms"
        for name, phase in best.phases.items()
    )
    return f"memory, GB per rank: {memory}\nsent by a rank per step: {phases or 'nothing'}"


def launch_command(job: Job, estimate: Estimate, config_file: str, model_flags: list[str]) -> str:
    """The exact command for this layout; several nodes take a ``hostfile``.

    Args:
        job, estimate: What is launched.
        config_file: The DeepSpeed config.
        model_flags: Flags of model, adapter and precision, as ``launch/train.py`` knows them.
    """
    cluster, layout, batch = job.cluster, estimate.layout, job.batch
    words = ["deepspeed"]
    if cluster.nodes > 1:
        words += ["--hostfile", "hostfile", "--num_nodes", str(cluster.nodes)]
    words += ["--num_gpus", str(cluster.ranks_per_node), "launch/train.py", "--deepspeed", config_file, *model_flags]
    words += ["--ep_size", str(layout.ep_size)]
    if layout.ep_size > 1:
        words += ["--expert_dispatch", layout.dispatch]
    if layout.chunk_tokens:
        words += ["--dispatch_chunk_tokens", str(layout.chunk_tokens)]
    if layout.checkpointing:
        words += ["--activation_checkpointing"]
    words += ["--per_device_train_batch_size", str(batch.micro), "--max_length", str(batch.length)]
    words += ["--gradient_accumulation_steps", str(batch.accumulation)]
    return shlex.join(words)
