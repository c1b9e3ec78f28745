"""The command line of launch/compare.py: its own flags, and those of launch/train.py, which every run gets."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from ldmole_ds.compare.methods import (
    LDMOLE,
    METHODS,
    SWEEPS,
    Method,
    methods_of,
    sweep_of,
    with_baseline,
    with_equal_parameters,
)
from ldmole_ds.compare.plan import Plan, as_argv
from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.planner.model_shape import load_config
from ldmole_ds.tasks import TASKS, demo_model_file, tasks_of
from ldmole_ds.training.arguments import adapter_config, parse_flags
from ldmole_ds.training.flags import Formatter, raise_user_error
from ldmole_ds.training.runtime import UserError

USAGE = """%(prog)s [--task NAME,...] [--methods NAME,...] [--flag value ...] [flags of launch/train.py]

  python launch/compare.py --methods ld-mole,lora,mola-8888 --seeds 1,2 --max_steps 70 --output_dir runs/compare
      three methods on the embedded model and task
  python launch/compare.py --task arc_easy,rte --model_name_or_path Qwen/Qwen3-1.7B --bf16 --max_steps 500 \\
      --launcher "deepspeed --num_gpus 2" --deepspeed ds_configs/zero2_bf16.json --output_dir runs/compare
      all methods on two benchmarks, each run on two GPUs
  python launch/compare.py --sweep target_num_experts --sparsity_loss_weight 1 --output_dir runs/sweep
      one setting of LD-MoLE varied
"""
# What a comparison sets itself, and what to give instead.
_OWN = {
    "learning_rate": "--learning_rates", "seed": "--seeds", "router": "--methods", "preset": "--methods",
    "experts_per_layer": "--methods", "validation_split": "nothing: the reported split of each task is used",
    "max_eval_samples": "--test_rows or --selection_rows", "train_file": "--task", "validation_file": "--task",
    "dataset_name": "--task", "label_words": "--task", "adapter_name_or_path": "nothing: every run starts anew",
    "overwrite_output_dir": "another --output_dir", "resume": "nothing: the same command goes on",
    "resume_from_checkpoint": "nothing: the same command goes on", "eval_on_start": "nothing",
    "token": "the environment variable HF_TOKEN",
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of the flags that are not launch/train.py's."""
    parser = argparse.ArgumentParser(
        prog="launch/compare.py",
        usage=USAGE,
        formatter_class=Formatter,
        allow_abbrev=False,
        description="Methods against each other under one budget: same rows, steps and batch, each with its best "
        "learning rate, several seeds, test rows measured once. Every run is launch/train.py in a process of its own; "
        "what is done is not run again, so the same command goes on where it was stopped.",
        epilog="Every other flag goes to all runs: see launch/train.py --help.",
    )
    parser.error = raise_user_error
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--task", default="clinc_domains", help=f"Tasks with commas between them: {', '.join(TASKS)} (docs/tasks.md)."
    )
    what.add_argument(
        "--methods",
        default=None,
        help=f"With commas between them: {', '.join(METHODS)} (docs/compare.md). Plain LoRA is always among them, as "
        "what the others are measured against. Default: all; with --sweep: ld-mole.",
    )
    what.add_argument(
        "--sweep",
        default=None,
        choices=tuple(SWEEPS),
        help="Vary this setting of one method instead of comparing methods: " + ", ".join(SWEEPS) + ".",
    )
    what.add_argument(
        "--sweep_values", default=None, help="With commas between them, instead of the sweep's own (docs/compare.md)."
    )
    what.add_argument(
        "--seeds",
        default="1,2,3",
        help="With commas between them. A seed sets the adapter's start and the order of rows; two and more show the "
        "spread that chance alone makes.",
    )
    budget = parser.add_argument_group("budget, the same for all")
    budget.add_argument(
        "--max_steps", type=int, default=None, help="Optimizer steps of a run. Default: 100, or --num_train_epochs."
    )
    budget.add_argument(
        "--learning_rates",
        default="5e-4,1e-3,2e-3",
        help="With commas between them. Several: each method takes its best by accuracy on rows that are not reported, "
        "with the first seed. Methods want different rates, so a single one favours the method it suits.",
    )
    budget.add_argument("--selection_rows", type=int, default=300, help="At most so many rows choose a learning rate.")
    budget.add_argument("--test_rows", type=int, default=None, help="At most so many test rows. Default: all.")
    running = parser.add_argument_group("running")
    running.add_argument("--output_dir", default="runs/compare", help="Folder of all runs, tables and plots.")
    running.add_argument("--parallel", type=int, default=1, help="Runs at a time.")
    running.add_argument(
        "--threads", type=int, default=None, help="Threads of each run. Default: the cores divided by --parallel."
    )
    running.add_argument(
        "--launcher",
        default=None,
        help='What starts a run instead of python: "deepspeed --num_gpus 2", with --deepspeed FILE. With --parallel '
        'above 1 each needs a port of its own: "deepspeed --num_gpus 2 --master_port {port}".',
    )
    running.add_argument(
        "--tables_only", action="store_true", help="Run nothing: write tables and plots from the runs that are done."
    )
    running.add_argument("--dry_run", action="store_true", help="Run nothing: list what would run.")
    return parser


def parse_compare_flags(argv: list[str]) -> tuple[argparse.Namespace, Plan]:
    """Own flags and the plan they make; launch/train.py's flags are checked for every method.

    Raises:
        UserError: A flag or value that cannot work, here or in training.
    """
    own, rest = build_parser().parse_known_args(argv)
    for name in ("max_steps", "selection_rows", "test_rows", "parallel", "threads"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(own, name)}")
    if own.parallel > 1 and own.launcher and "{port}" not in own.launcher:
        raise UserError(
            f"--parallel {own.parallel} with --launcher needs a port for each run: give the launcher's own flag, "
            f'such as --launcher "{own.launcher} --master_port {{port}}"'
        )
    if own.sweep_values is not None and not own.sweep:
        raise UserError("--sweep_values is for --sweep: name the setting to vary")
    own.threads = own.threads or max(1, (os.cpu_count() or 1) // own.parallel)
    try:
        return own, make_plan(own, rest)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_plan(own: argparse.Namespace, rest: list[str]) -> Plan:
    """The plan of parsed flags.

    Raises:
        ValueError, UserError: A value cannot work; the message names it.
    """
    tasks = tasks_of(own.task)
    flags, common = train_flags(own, rest)
    seeds, rates = numbers("seeds", own.seeds, int), numbers("learning_rates", own.learning_rates, float)
    if min(seeds) < 0 or min(rates) <= 0:
        raise ValueError(f"--seeds {own.seeds} must be 0 or more, --learning_rates {own.learning_rates} above 0")
    plan = Plan(
        tasks=tuple(tasks),
        methods=tuple(resolve_methods(own, common, flags)),
        seeds=seeds,
        learning_rates=rates,
        flags=flags,
        folder=Path(own.output_dir).absolute(),
        launcher=tuple(shlex.split(own.launcher)) if own.launcher else (sys.executable,),
        selection_rows=own.selection_rows,
        test_rows=own.test_rows,
        sweep=own.sweep,
    )
    for method in plan.methods:
        try:
            adapter_config(parse_flags(list(as_argv({**flags, **method.settings, "task": tasks[0].name}))))
        except ValueError as error:
            raise ValueError(f"method {method.name}: {error}") from error
    return plan


def train_flags(own: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], LDMoLEConfig]:
    """The flags of all runs, by name and as given, and the adapter settings among them."""
    parsed = parse_flags([*rest, "--task", own.task])
    given = sorted(parsed.given - {"task"})
    clash = [name for name in given if name in _OWN]
    if clash:
        raise UserError(f"--{clash[0]} is set by the comparison: give {_OWN[clash[0]]}")
    flags = {name: _plain(getattr(parsed, name)) for name in given}
    if own.max_steps is not None or "num_train_epochs" not in flags:
        flags["max_steps"] = own.max_steps or 100
    return flags, adapter_config(parsed)


def _plain(value: Any) -> Any:
    """As a flag is written."""
    if isinstance(value, dict):
        return json.dumps(value)
    return value.value if hasattr(value, "value") else value


def resolve_methods(own: argparse.Namespace, common: LDMoLEConfig, flags: dict[str, Any]) -> list[Method]:
    """Methods, or the variants of a sweep, with plain LoRA first."""
    names = own.methods if own.methods is not None else LDMOLE if own.sweep else ",".join(METHODS)
    methods = methods_of(names)
    if own.sweep:
        varied = [method for method in methods if method.name in map(str.strip, names.split(","))]
        if len(varied) != 1:
            raise ValueError(f"--sweep varies one method: --methods names {len(varied)}")
        router = varied[0].settings.get("router", common.router)
        if own.sweep == "target_num_experts" and router != "relu" and not common.sparsity_loss_weight:
            raise ValueError("--sweep target_num_experts needs the sparsity loss: add --sparsity_loss_weight 1")
        return with_baseline(sweep_of(own.sweep, own.sweep_values, varied[0], common))
    if any(method.equal_parameters for method in methods):
        name = flags.get("model_name_or_path") or str(demo_model_file())
        hf_config = load_config(name, revision=flags.get("revision", "main"))
        methods = [with_equal_parameters(m, common, hf_config) if m.equal_parameters else m for m in methods]
    return methods


def numbers(flag: str, text: str, kind: type) -> tuple:
    """Different numbers with commas between them, at least one."""
    try:
        found = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"--{flag} {text!r}: give numbers with commas between them") from error
    if not found or len(set(found)) < len(found):
        raise ValueError(f"--{flag} {text!r}: give one or several different numbers with commas between them")
    return found
