#!/usr/bin/env python
"""launch/plan.py against measurement: real DeepSpeed steps of small, mid-sized and wide models on gloo.

    python benchmarks/plan_accuracy.py --output benchmarks/results/plan_accuracy.md
    python benchmarks/plan_accuracy.py --rate_gbit 2 0.5 --delay_ms 1      also over slower links (needs root and tc)

Per world size one job calibrates the planner (`ldmole_ds.planner.calibrate`, with models that are none of the cases'),
trains each case, and calibrates again; each time counts as the faster of the two measured it. With it the planner is
given the rows that each dispatch really moved. Parameters, calls and bytes must be exact; step times are within 25 % or
marked.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.delayed_link import delayed_link  # noqa: E402
from benchmarks.planned_steps import MODELS, STEPS, Case, cases, measure  # noqa: E402
from benchmarks.slow_link import enter_own_network, limited  # noqa: E402
from ldmole_ds.planner import Cluster, Job, Precision, Routing, kind_of, shape_of_config, trace_step  # noqa: E402
from ldmole_ds.planner.calibrate import Times  # noqa: E402
from ldmole_ds.planner.communication import expert_phases  # noqa: E402
from ldmole_ds.planner.solve import Calibration, describe, solve  # noqa: E402
from ldmole_ds.training.run_record import versions  # noqa: E402
from tests.distributed_utils import run_distributed  # noqa: E402

TIME_BAR = 0.25
WIRES = (
    " Limited wires are a token bucket on loopback (both ranks together); delayed ones are TUN devices with a relay "
    "that holds every packet back, as the kernel has no netem."
)


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
    kind = kind_of(layout, found.device, Precision())
    trace = trace_step(hf_config, adapter, kind, micro=micro, length=length)
    job = Job(shape, cluster, batch, Precision(), routing, {kind: trace})
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
            "`launch/plan.py` against DeepSpeed steps of three Llamas (small: hidden 64 with 2 layers, r 4; mid: 384 "
            "with 4, r 8; wide: 512 with 4, r 32 and few tokens), 8 experts on every projection, float32. "
            f"Reproduce{' (as root)' * bool(arguments.rate_gbit)}: `python benchmarks/plan_accuracy.py"
            f"{harness.flags(arguments, parser.parse_args([]))}`.",
            "",
            f"{exact} of {len(lines)} cases have exact parameters, calls and bytes (given the rows that were "
            f"dispatched); {close} of {len(lines)} step times are within {100 * TIME_BAR:.0f} %, the others are bold. "
            f"A step takes as long as its slowest rank; the fastest of {STEPS * arguments.runs} is compared, as other "
            "work on the machine only adds. The last column compares the bytes alive at the peak of forward and "
            "backward, counted tensor "
            f"by tensor.{WIRES * any(wire != '-' for _, wire, _ in jobs)}",
            "",
            f"{date.today()}, {os.cpu_count()} cores ({platform.machine()}), gloo, one thread per rank: more ranks "
            f"than cores share them, and other work on the machine shows in the medians. Versions: {found_versions}. "
            "No GPU was used: the 10 % bar of memory against `max_memory_allocated` is not measured yet.",
            "",
            HEAD,
            *lines,
            "",
            "What the planner was given, measured before and after the cases with models that are none of them "
            "(`ldmole_ds/planner/reference.py`):",
            "",
            *notes,
            "",
        ]
    )
    print(f"\n{exact} exact, {close} close of {len(lines)} in {time.perf_counter() - begin:.0f} s")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
