#!/usr/bin/env python
"""Look at this job before training on it.

    python launch/doctor.py                              one process: versions, machine, what to fix
    deepspeed --num_gpus 8 launch/doctor.py              the same on eight ranks, and how fast their link is
    deepspeed --num_gpus 8 launch/doctor.py --parity     does the layout change the training? pass or fail for each

Without --parity: versions and whether they are tested, each rank's host, device, threads and space, latency and
bandwidth of the collectives of expert parallelism, one exchange of tokens checked against all experts in one place, and
what to fix. One process alone sends its tokens to itself, so that one GPU is enough to try NCCL. With --parity: a small
model trains five steps in a dozen or two layouts (ep_size x ZeRO stage x precision) and must equal one dense process.
Exit code 1 if something computed wrongly or failed, 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.orphans import watch_launchers

if __name__ == "__main__":
    watch_launchers()

from ldmole_ds.training.runtime import UserError, is_main_process, run_main


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parity", action="store_true", help="train every layout of this many ranks and compare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE, as JSON")
    parser.add_argument("--ep_size", type=int, help="without --parity: ranks that exchange tokens (default: all)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="whose disk space to look at")
    parser.add_argument(
        "--ddp_timeout", type=int, default=300, help="seconds until a collective gives up (default: 300)"
    )
    parser.add_argument("--quick", action="store_true", help="with --parity: two or three layouts only")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.error = _refuse
    return parser.parse_args(argv)


def _refuse(message: str) -> None:
    raise UserError(f"{message}; see launch/doctor.py --help")


def main(argv: list[str]) -> None:
    args = parse(argv)
    from ldmole_ds.doctor.findings import before_start
    from ldmole_ds.doctor.machine import start_facts
    from ldmole_ds.training import runtime
    from ldmole_ds.training.run_record import write_json

    runtime.join_network(runtime.ranks_of_job())
    # What may keep the job from starting must be said before it is tried, once per host.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for finding in before_start(start_facts()):
            print(f"before the start: {finding}", file=sys.stderr, flush=True)
    accelerator = runtime.start(use_deepspeed=True, timeout_s=args.ddp_timeout)
    result = (parity if args.parity else examine)(args, accelerator)
    with runtime.agreed("--json"):
        if args.json and is_main_process():
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, result)
    runtime.stop()
    sys.exit(0 if result["passed"] else 1)


def examine(args: argparse.Namespace, accelerator: str) -> dict:
    """Versions, machine, link and one exchange. Collective."""
    import torch
    import torch.distributed as dist

    from ldmole_ds.doctor.exchange import check_exchange, exchange_groups
    from ldmole_ds.doctor.link import measure_collectives, transport_of
    from ldmole_ds.doctor.machine import accelerator_versions, rank_facts
    from ldmole_ds.doctor.report import Report
    from ldmole_ds.training.run_record import versions
    from ldmole_ds.training.runtime import agreed, limit_group_timeouts

    with agreed("--ep_size"):
        topology = exchange_groups(args.ep_size)
    limit_group_timeouts(args.ddp_timeout)
    installed = {**versions(), **accelerator_versions(accelerator)}
    ranks = [rank_facts(dist.get_rank(), accelerator, args.output_dir, installed)] * dist.get_world_size()
    dist.all_gather_object(ranks, ranks[0])
    device = torch.device("cuda", torch.cuda.current_device()) if accelerator == "cuda" else torch.device("cpu")
    link, exchange = measure_collectives(topology.collectives, device), check_exchange(topology, device)
    transport = transport_of(topology, device)
    report = Report(accelerator, dist.get_backend(), topology.ep_size, ranks, transport, link, exchange)
    if is_main_process():
        print(report, flush=True)
    return report.to_json()


def parity(args: argparse.Namespace, accelerator: str) -> dict:
    """The contract on these ranks, each row printed as soon as it is known. Collective."""
    from dataclasses import asdict

    import torch
    import torch.distributed as dist

    from ldmole_ds.parity import Verdict, exit_code, job_cells, run_job, verdict_table
    from ldmole_ds.training.run import quiet_libraries
    from ldmole_ds.training.run_record import versions
    from ldmole_ds.training.runtime import limit_group_timeouts

    quiet_libraries()
    bf16 = accelerator != "cuda" or torch.cuda.is_bf16_supported()
    cells = job_cells(dist.get_world_size(), bf16=bf16, quick=args.quick)
    verdicts: list[Verdict] = []
    begin = time.perf_counter()

    def show(verdict: Verdict) -> None:
        verdicts.append(verdict)
        limit_group_timeouts(args.ddp_timeout)  # a layout makes its groups when it is first run
        if is_main_process():
            lines = verdict_table([verdict]).splitlines()
            print("\n".join(lines if len(verdicts) == 1 else lines[-1:]), flush=True)

    if is_main_process():
        print(f"{len(cells)} layouts, a few seconds each", flush=True)
    try:
        run_job(cells, show)
    except Exception:
        print(f"rank {dist.get_rank()} could not run: {cells[len(verdicts)]}", file=sys.stderr, flush=True)
        raise
    passed = sum(v.passed for v in verdicts)
    if is_main_process():
        print(f"\n{passed} of {len(cells)} layouts pass, {time.perf_counter() - begin:.0f} s", flush=True)
    rows = [{"name": str(v.cell), **asdict(v)} for v in verdicts]
    return {"versions": versions(), "cells": rows, "passed": exit_code(verdicts) == 0}


if __name__ == "__main__":
    run_main(main)
