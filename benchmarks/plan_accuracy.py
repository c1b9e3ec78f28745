#!/usr/bin/env python
"""launch/plan.py against measurement: real DeepSpeed steps of a small and a mid-sized model on gloo ranks.

    python benchmarks/plan_accuracy.py --output benchmarks/results/plan_accuracy.md
    python benchmarks/plan_accuracy.py --rate_gbit 2 0.5 --delay_ms 1      also over slower links (needs root and tc)

Per world size one job calibrates the planner (`ldmole_ds.planner.calibrate`, with a model that is none of the cases'),
trains each case, and calibrates again; each time counts as the faster of the two measured it. With it the planner is
given the rows that each dispatch really moved. Parameters, calls and bytes must be exact; step times are within 25 % or
marked.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from benchmarks.delayed_link import DelayedLink, delayed_link, join  # noqa: E402
from benchmarks.slow_link import enter_own_network, limited  # noqa: E402
from ldmole_ds.config import LDMoLEConfig  # noqa: E402
from ldmole_ds.planner import (  # noqa: E402
    Batch,
    Cluster,
    Job,
    Layout,
    Precision,
    Routing,
    shape_of_config,
    trace_step,
)
from ldmole_ds.planner.calibrate import Times  # noqa: E402
from ldmole_ds.planner.calibrate import measure as measure_machine  # noqa: E402
from ldmole_ds.planner.calibrate_steps import zero_settings  # noqa: E402
from ldmole_ds.planner.communication import expert_phases  # noqa: E402
from ldmole_ds.planner.solve import Calibration, describe, solve  # noqa: E402
from ldmole_ds.training.run_record import versions  # noqa: E402
from tests.distributed_utils import run_distributed  # noqa: E402

STEPS, WARM = 5, 1
TIME_BAR = 0.25


def _llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads // 2)


# Base, adapter, rows and tokens of a micro-step.
MODELS = {
    "small": (_llama(64, 96, 2, 4, 128), LDMoLEConfig(r=4, lambda_hidden_size=16, lora_dropout=0.0), 4, 32),
    "mid": (_llama(384, 1024, 4, 6, 4096), LDMoLEConfig(r=8, lambda_hidden_size=128, lora_dropout=0.0), 4, 64),
}


@dataclass(frozen=True)
class Case:
    """One layout of one model."""

    model: str
    layout: Layout
    accumulation: int = 1

    def batch(self) -> Batch:
        return Batch(*MODELS[self.model][2:], self.accumulation)

    def __str__(self) -> str:
        marks = [f"ZeRO-{self.layout.zero_stage}", "recompute" * self.layout.checkpointing]
        marks += [f"chunks of {self.layout.chunk_tokens}" * bool(self.layout.chunk_tokens)]
        marks += [f"{self.accumulation} micro-steps" * (self.accumulation > 1)]
        experts = "replicated" if self.layout.ep_size == 1 else f"ep {self.layout.ep_size} {self.layout.dispatch}"
        return ", ".join([self.model, experts, *filter(None, marks)])


def cases(world_size: int) -> list[Case]:
    """What is measured with this many ranks."""
    found = []
    for model in MODELS:
        found.append(Case(model, Layout()))
        if world_size > 1:
            found += [Case(model, Layout(world_size, 2, mode)) for mode in ("weights", "tokens")]
    if world_size == 2:
        found += [
            Case("mid", Layout(2, 1, "tokens")),
            Case("mid", Layout(2, 3, "tokens")),
            Case("mid", Layout(2, 2, "tokens", checkpointing=True)),
            Case("mid", Layout(2, 2, "tokens", chunk_tokens=100)),
            Case("mid", Layout(2, 2, "weights"), accumulation=2),
            Case("mid", Layout(2, 2, "weights", checkpointing=True)),
        ]
    if world_size == 4:
        found.append(Case("mid", Layout(2, 2, "tokens")))
    return found


# ---- on the ranks ----


def measure(rank: int, world_size: int, planned: list[Case], link: DelayedLink | None = None) -> dict:
    """Times of the calibration, and what each case did. Collective."""
    if link:
        join(link, rank)
    before = measure_machine(torch.device("cpu"))
    results = [measure_case(case) for case in planned]
    return {"times": before.best(measure_machine(torch.device("cpu"))), "results": results}


def measure_case(case: Case) -> dict:
    """Train a few steps; figures of this rank. Collective."""
    import deepspeed

    from ldmole_ds.distributed.dispatch import AllToAllTokenDispatcher
    from ldmole_ds.model import get_ldmole_model, ldmole_param_groups
    from ldmole_ds.parity.model import wake_experts
    from ldmole_ds.planner.model_shape import build_base
    from ldmole_ds.planner.trace import trace_model

    hf_config, adapter, micro, length = MODELS[case.model]
    layout, batch = case.layout, case.batch()
    torch.manual_seed(0)  # the engine takes rank 0's base: all must route the traced step with it
    base = build_base(hf_config)
    torch.manual_seed(dist.get_rank())
    ids = [torch.randint(0, hf_config.vocab_size, (micro, length)) for _ in range(batch.accumulation)]
    memory_before = _resident()
    model = get_ldmole_model(
        base,
        adapter,
        0,
        layout.ep_size,
        "tokens" if layout.ep_size == 1 else layout.dispatch,
        dispatch_chunk_tokens=layout.chunk_tokens,
    )
    wake_experts(model)
    if layout.checkpointing:
        model.gradient_checkpointing_enable()
    rows: dict[str, list[tuple[int, int]]] = {group.name: [] for group in model.input_groups}
    plan = AllToAllTokenDispatcher.plan

    def watched_plan(self, probs, channel, *rest):
        found = plan(self, probs, channel, *rest)
        rows[channel.layer].append((sum(found.input_splits), sum(found.output_splits)))
        return found

    AllToAllTokenDispatcher.plan = watched_plan
    figures = {
        "peak": trace_model(model, ids[0]).peak,
        "parameters": model.num_parameters_by_kind(),
    }
    AllToAllTokenDispatcher.plan = plan
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": zero_settings(layout.zero_stage, hf_config.hidden_size),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # A rate of zero: routing stays that of the traced step, while every step does all its work. Gathered experts that
    # did not change would not be gathered again, so these move a little.
    rate = 1e-6 if layout.dispatch == "weights" else 0.0
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=rate)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    times = []
    for _ in range(WARM + STEPS):
        model.comm_stats.reset()
        dist.barrier()
        begin = time.perf_counter()
        for micro_ids in ids:
            mask = torch.ones_like(micro_ids)
            loss = engine(
                input_ids=micro_ids,
                attention_mask=mask,
                labels=micro_ids,
                use_cache=False,
                gradient_accumulation_steps=batch.accumulation,
            ).loss
            engine.backward(loss)
            engine.step()
        slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times.append(slowest.item())
    stats = model.comm_stats
    figures |= {
        "all_seconds": times[WARM:],
        "phases": {name: (stats.calls[name], stats.bytes[name]) for name in stats.calls},
        "rows": [_totals(rows[group.name], layout.checkpointing) for group in model.input_groups],
        "resident": _resident("VmHWM") - memory_before,
    }
    engine.destroy()
    del engine, model, optimizer, loss
    gc.collect()
    return figures


def _totals(found: list[tuple[int, int]], recomputed: bool) -> tuple[float, float]:
    """Rows sent and received in one forward pass: its chunks add up, and recomputation has them twice."""
    passes = 2 if recomputed else 1
    return sum(sent for sent, _ in found) / passes, sum(received for _, received in found) / passes


def _resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory now, or at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# ---- here ----


def fastest_of(runs: list[dict]) -> dict:
    """Several runs of `measure` as one: each time by itself is the fastest, of the calibration as of the cases."""
    times = functools.reduce(Times.best, (run["times"] for run in runs))
    results = []
    for found in zip(*(run["results"] for run in runs), strict=True):
        seconds = sorted(t for figures in found for t in figures["all_seconds"])
        results.append({**found[0], "seconds": seconds[0], "median": statistics.median(seconds)})
    return {"times": times, "results": results}


def predict(case: Case, world_size: int, found: Calibration, figures: dict) -> dict:
    """The planner's figures for this case, given the rows that its dispatches moved."""
    hf_config, adapter, micro, length = MODELS[case.model]
    layout, batch, shape = case.layout, case.batch(), shape_of_config(hf_config, adapter)
    wire = found.wire(layout.ep_size)
    cluster = Cluster(found.device, 1, world_size, wire, wire, found.costs)
    sent = statistics.mean(row[0] for row in figures["rows"])
    routing = Routing(adapter.num_experts, remote_ranks=sent / batch.tokens)
    trace = trace_step(hf_config, adapter, micro=micro, length=length, checkpointing=layout.checkpointing)
    job = Job(shape, cluster, batch, Precision(), routing, {layout.checkpointing: trace})
    estimate = job.estimate(layout)
    phases = expert_phases(shape, layout, batch, 4, figures["rows"]) if layout.ep_size > 1 else {}
    dense, experts = shape.held(layout.ep_size)
    memory = estimate.memory
    return {
        "seconds": estimate.step_seconds,
        "phases": {name: (phase.calls, phase.bytes) for name, phase in phases.items()},
        "parameters": {
            "trainable": shape.trainable,
            "trainable_on_this_rank": dense + experts,
            "base": shape.frozen,
        },
        "peak": memory.activations + memory.dispatch,
        "resident": memory.total,
    }


def row(case: Case, world_size: int, wire: str, figures: dict, planned: dict) -> tuple[str, bool, bool]:
    """A line of the table; whether counts are exact; whether the time is within the bar."""
    exact = planned["parameters"] == figures["parameters"] and set(planned["phases"]) == set(figures["phases"])
    for name, (calls, num_bytes) in figures["phases"].items():
        expected = planned["phases"].get(name, (0, 0))
        exact = exact and abs(expected[0] - calls) < 1e-6 and abs(expected[1] - num_bytes) < 0.5
    error = planned["seconds"] / figures["seconds"] - 1
    sent = sum(num_bytes for _, num_bytes in figures["phases"].values())
    cells = [
        str(world_size),
        wire,
        str(case),
        f"{figures['parameters']['trainable']:,}",
        f"{sent / 1e6:.2f}",
        "exact" if exact else "**differ**",
        f"{planned['seconds'] * 1e3:.0f}",
        f"{figures['seconds'] * 1e3:.0f} ({figures['median'] * 1e3:.0f})",
        f"{100 * error:+.0f} %" if abs(error) <= TIME_BAR else f"**{100 * error:+.0f} %**",
        f"{100 * (planned['peak'] / figures['peak'] - 1):+.0f} % of {figures['peak'] / 1e6:.1f} MB",
    ]
    return "| " + " | ".join(cells) + " |", exact, abs(error) <= TIME_BAR


HEAD = (
    "| ranks | wire | case | trainable | sent by rank 0, MB | parameters, calls, bytes | planned, ms | "
    "fastest (median), ms | time | activations and dispatch |\n|" + " --- |" * 10
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table here as well")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--rate_gbit", type=float, nargs="+", default=[], help="limits of the link, for 2 ranks")
    parser.add_argument("--delay_ms", type=float, nargs="+", default=[], help="delays each way, for 2 ranks")
    parser.add_argument(
        "--runs", type=int, default=1, help="repeat everything so often; each time counts as the fastest"
    )
    arguments = parser.parse_args()
    if arguments.rate_gbit:
        enter_own_network()
    begin, lines, exact, close, notes = time.perf_counter(), [], 0, 0, []
    print(HEAD, flush=True)
    jobs = [(w, "-", nullcontext()) for w in arguments.worlds]
    jobs += [(2, f"{rate:g} Gbit/s", limited(rate)) for rate in arguments.rate_gbit]
    jobs += [(2, f"{delay:g} ms each way", delayed_link(2, delay)) for delay in arguments.delay_ms]
    for world_size, wire, context in jobs:
        planned = cases(world_size)
        if wire != "-":
            planned = [c for c in planned if c.layout.zero_stage == 2 and not c.layout.checkpointing]
        with context as link:
            found = fastest_of(
                [
                    run_distributed(measure, world_size, planned, link, deepspeed=not link, timeout_s=1500)[0]
                    for _ in range(arguments.runs)
                ]
            )
        calibration = solve(found["times"])
        notes.append(f"- {world_size} rank(s){f', {wire}' * (wire != '-')}: {describe(calibration)}")
        for case, figures in zip(planned, found["results"], strict=True):
            planned_figures = predict(case, world_size, calibration, figures)
            text, is_exact, is_close = row(case, world_size, wire, figures, planned_figures)
            exact, close = exact + is_exact, close + is_close
            lines.append(text)
            print(text, flush=True)
    found_versions = ", ".join(f"{k} {v}" for k, v in versions().items())
    text = "\n".join(
        [
            "# The planner against measurement",
            "",
            "`launch/plan.py` against DeepSpeed steps of two Llamas (hidden 64 with 2 layers; hidden 384 with 4), "
            "8 experts on every projection, float32. Reproduce (as root): `python "
            "benchmarks/plan_accuracy.py --rate_gbit 2 0.5 --delay_ms 1`.",
            "",
            f"{exact} of {len(lines)} cases have exact parameters, calls and bytes (given the rows that were "
            f"dispatched); {close} of {len(lines)} step times are within {100 * TIME_BAR:.0f} %, the others are bold. "
            f"A step takes as long as its slowest rank; the fastest of {STEPS * arguments.runs} is compared, as other "
            "work on the machine only adds. The last column compares the bytes alive at the peak of forward and "
            "backward, counted tensor "
            "by tensor. Limited wires are a token bucket on loopback (both ranks together); delayed ones are TUN "
            "devices with a relay that holds every packet back, as the kernel has no netem.",
            "",
            f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), gloo, one thread per rank: 4 ranks share "
            f"them, and other work on the machine shows in the medians. Versions: {found_versions}. No GPU was used: "
            "the 10 % bar of memory against `max_memory_allocated` is not measured yet.",
            "",
            HEAD,
            *lines,
            "",
            "What the planner was given, measured before and after the cases with a model that is none of them "
            "(Llama, hidden 256 with 3 layers):",
            "",
            *notes,
            "",
        ]
    )
    print(f"\n{exact} exact, {close} close of {len(lines)} in {time.perf_counter() - begin:.0f} s")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    # Ranks import this module by its name.
    from benchmarks import plan_accuracy

    plan_accuracy.main()
