"""Measuring side by side: interleaved timings, peak memory in a process of its own, and the report.

On a machine that others use too, two timings taken one after the other differ for reasons of their own. So variants
take turns within each round, in changing order, and a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def synchronize() -> None:
    """Wait for the accelerator, where there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; the first ``warmup`` rounds are not kept.

    ``before`` runs before each timing; several ranks meet there. The order of variants is the same on all of them.
    ``clock``: `time.process_time` leaves out what other programs take, for variants of one thread that never wait.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, rng = list(variants), random.Random(0)
    for i in range(warmup + rounds):
        rng.shuffle(order)
        for name in order:
            before()
            synchronize()
            start = clock()
            variants[name]()
            synchronize()
            if i >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Median and quartiles over rounds of the time of ``name`` in units of that of ``base`` in the same round."""
    return spread([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])


class PeakMemory:
    """Bytes above what the process holds at the start of the block, at their highest.

    CPU: the kernel's high-water mark of the resident set (``VmHWM``), set back through ``/proc/self/clear_refs``; run
    the variant in a process of its own. CUDA: torch's own peak. ``bytes`` is the growth, ``total`` all that is held.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.total = torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")
        self.bytes = self.total - self.start

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peak_of(run: Callable[[], object]) -> tuple[int, float]:
    """Peak of ``run`` above what is held before it, with memory that was freed given back first; and its seconds.

    For tensors of many MB this needs no process of its own.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    with PeakMemory() as memory:
        begin = time.perf_counter()
        run()
        synchronize()
        seconds = time.perf_counter() - begin
    return memory.bytes, seconds


def in_own_process(script: Path, *arguments: str) -> dict:
    """What ``script`` prints as its last line, JSON, run with these arguments."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    """Date, hardware and threads in one line."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{_cpu_name()}, {os.cpu_count()} cores"
    return f"{datetime.date.today()}, {device}, {torch.get_num_threads()} threads, {platform.machine()}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def flags(args: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """What was given on the command line, as it is typed, but for where the output goes."""

    def typed(value: object) -> str:
        return shlex.join(map(str, value if isinstance(value, list) else [value]))

    changed = {k: v for k, v in vars(args).items() if v != getattr(defaults, k) and k != "output"}
    return "".join(f" --no-{k}" if v is False else f" --{k} {typed(v)}" for k, v in changed.items())


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *body])


def write(name: str, markdown: str, values: dict, folder: Path | None = None) -> None:
    """Print the Markdown, and keep it with the raw values under ``benchmarks/results``."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown)
    (folder / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")
    print(markdown)
