#!/usr/bin/env python
"""Look at this job before training on it.

    python launch/doctor.py                              one process: versions, machine, what to fix
    deepspeed --num_gpus 8 launch/doctor.py              the same on eight ranks, and how fast their link is
    deepspeed --num_gpus 8 launch/doctor.py --parity     does the layout change the training? pass or fail for each

Without --parity: versions and whether they are tested, each rank's host, device, threads and space, latency and
bandwidth of the collectives of expert parallelism, one exchange of tokens checked against all experts in one place, and
what to fix. With --parity: a small model trains five steps in a dozen or two layouts (ep_size x ZeRO stage x precision)
and must equal one dense process. Exit code 1 if something computed wrongly, 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldmole_ds.training.runtime import UserError, is_main_process, run_main


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parity", action="store_true", help="train every layout of this many ranks and compare")
    parser.add_argument("--ep_size", type=int, help="ranks in a group for the link's measurement (default: all)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="where training would write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well, as JSON")
    parser.add_argument("--timeout", type=int, default=300, help="seconds until a collective gives up (default 300)")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.error = _refuse
    return parser.parse_args(argv)


def _refuse(message: str) -> None:
    raise UserError(f"{message}; see launch/doctor.py --help")


def main(argv: list[str]) -> None:
    args = parse(argv)
    # What may keep the job from starting must be said before it is tried, once per host.
    from ldmole_ds.analysis.findings import before_start
    from ldmole_ds.analysis.machine import start_facts
    from ldmole_ds.training import runtime

    if os.environ.get("LOCAL_RANK", "0") == "0":
        for finding in before_start(start_facts()):
            print(f"before the start: {finding}", file=sys.stderr, flush=True)
    accelerator = runtime.start(use_deepspeed=True, timeout_s=args.timeout)
    result, passed = parity(args, accelerator) if args.parity else examine(args, accelerator)
    if args.json and is_main_process():
        from ldmole_ds.training.run_record import write_json

        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, result)
    runtime.stop()
    sys.exit(0 if passed else 1)


def examine(args: argparse.Namespace, accelerator: str) -> tuple[dict, bool]:
    """Versions, machine, link and one exchange. Collective."""
    import torch
    import torch.distributed as dist

    from ldmole_ds.analysis.doctor_report import Report
    from ldmole_ds.analysis.exchange_check import check_exchange, single_rank_group
    from ldmole_ds.analysis.link import measure_collectives
    from ldmole_ds.analysis.machine import rank_facts
    from ldmole_ds.distributed import expert_parallel
    from ldmole_ds.training.run_record import versions
    from ldmole_ds.training.runtime import agreed, limit_group_timeouts

    device = torch.device(accelerator, torch.cuda.current_device()) if accelerator == "cuda" else torch.device("cpu")
    world_size = dist.get_world_size()
    with agreed("--ep_size"):
        ep_size = world_size if args.ep_size is None else args.ep_size
        topology = expert_parallel(ep_size) if ep_size > 1 or world_size > 1 else single_rank_group()
    limit_group_timeouts(args.timeout)
    facts = rank_facts(dist.get_rank(), accelerator, args.output_dir, versions())
    ranks = [facts] * world_size
    dist.all_gather_object(ranks, facts)
    link = measure_collectives(topology.ep_group, device)
    report = Report(accelerator, dist.get_backend(), ep_size, ranks, link, check_exchange(topology, device))
    if is_main_process():
        print(report, flush=True)
    return report.to_json(), report.passed


def parity(args: argparse.Namespace, accelerator: str) -> tuple[dict, bool]:
    """The contract on these ranks, with a row printed as soon as it is known. Collective."""
    from dataclasses import asdict

    import torch
    import torch.distributed as dist

    from ldmole_ds.parity import exit_code, job_cells, run_job, verdict_table
    from ldmole_ds.training.run import quiet_libraries
    from ldmole_ds.training.run_record import versions
    from ldmole_ds.training.runtime import limit_group_timeouts

    quiet_libraries()
    bf16 = accelerator != "cuda" or torch.cuda.is_bf16_supported()
    cells = job_cells(dist.get_world_size(), bf16=bf16, quick=args.quick)
    if is_main_process():
        print(f"{len(cells)} layouts, a few seconds each", flush=True)
    begin, done = time.perf_counter(), 0

    def show(verdict) -> None:
        nonlocal done
        done += 1
        limit_group_timeouts(args.timeout)
        if is_main_process():
            *head, row = verdict_table([verdict]).splitlines()
            print("\n".join([*head, row] if done == 1 else [row]), flush=True)

    verdicts = run_job(cells, show)
    failed = sum(not v.passed for v in verdicts)
    if is_main_process():
        seconds = time.perf_counter() - begin
        print(f"\n{len(verdicts) - failed} of {len(cells)} layouts pass, {seconds:.0f} s", flush=True)
    rows = [{"name": str(v.cell), **asdict(v)} for v in verdicts]
    return {"versions": versions(), "cells": rows}, exit_code(verdicts) == 0


if __name__ == "__main__":
    run_main(main)
