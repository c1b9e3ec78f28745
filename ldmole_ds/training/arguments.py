"""The command line: the groups of `ldmole_ds.training.argument_groups`, from flags, from a settings file, or both."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS, Namespace
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from ldmole_ds.config import PRESETS, LDMoLEConfig
from ldmole_ds.tasks import DataError, tasks_of
from ldmole_ds.training.argument_groups import (
    NOT_FLAGS,
    AdapterArguments,
    DataArguments,
    LayoutArguments,
    LDMoLETrainingArguments,
    ModelArguments,
)
from ldmole_ds.training.batch import BatchArguments
from ldmole_ds.training.flag_values import check_flag_values
from ldmole_ds.training.flags import Formatter, raise_user_error
from ldmole_ds.training.runtime import UserError
from ldmole_ds.training.settings_file import as_argv, read_settings_file

# Shown by --help; every other TrainingArguments flag works too and is shown by --help_all.
_COMMON_TRAINING_FLAGS = {
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "activation_checkpointing", "eval_strategy",
    "eval_steps", "eval_on_start", "logging_steps", "save_strategy", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "report_to", "seed", "data_seed", "deepspeed", "ddp_timeout", "disable_tqdm",
    "push_to_hub",
}  # fmt: skip


USAGE = """%(prog)s [run.yaml] [--flag value ...]

  deepspeed --num_gpus 2 launch/train.py --deepspeed ds_configs/zero2.json
      trains on the embedded model and data with settings of its own: nothing else is needed
  deepspeed launch/train.py --deepspeed ds_configs/zero2_bf16.json --bf16 \\
      --model_name_or_path Qwen/Qwen3-1.7B --train_file train.jsonl --validation_file test.jsonl --output_dir runs/one
      trains any causal language model on your own rows
"""


def build_parser(*, all_flags: bool = False) -> HfArgumentParser:
    """The parser; with ``all_flags`` its help lists every TrainingArguments flag."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, AdapterArguments, LayoutArguments, BatchArguments, LDMoLETrainingArguments),
        prog="launch/train.py",
        usage=USAGE,
        formatter_class=Formatter,
        description="Fine-tune a language model with LD-MoLE: LoRA experts over ranks, chosen per token.",
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", action="help", help="show every training flag of Hugging Face too")
    if not all_flags:
        training = {f.name for f in dataclasses.fields(TrainingArguments)}
        for action in parser._actions:
            names = {option.lstrip("-") for option in action.option_strings}
            if action.dest in training and not names & _COMMON_TRAINING_FLAGS or action.dest.startswith("no_"):
                action.help = SUPPRESS
    return parser


def parse_flags(argv: list[str], demo_defaults: dict | None = None) -> Namespace:
    """Parse flags, after those of a settings file if the first word names one. Touches no accelerator.

    Args:
        argv: Without the program's name.
        demo_defaults: Defaults that hold when neither data nor model is given: those of the embedded run.

    Raises:
        UserError: An unknown flag or setting, or a value of the wrong type.

    Returns:
        All values by name, and in ``given`` the names of those that flags, file or preset set.
    """
    parser = build_parser(all_flags="--help_all" in argv)
    parser.error = raise_user_error
    known = {option.lstrip("-"): action.dest for action in parser._actions for option in action.option_strings}
    argv = [a for a in argv if not a.startswith("--local_rank")]
    if argv and not argv[0].startswith("-"):
        path = Path(argv[0])
        argv = [*as_argv(read_settings_file(path), known, path), *argv[1:]]
    flags = (a[2:].split("=")[0] for a in argv if a.startswith("--"))
    given = {known.get(name, name) for name in flags}
    embedded = not given & {"train_file", "dataset_name", "validation_file", "task"}
    # --help shows the defaults that hold for one's own data.
    if embedded and demo_defaults and not {"-h", "--help", "--help_all"} & set(argv):
        parser.set_defaults(**demo_defaults)
    first = parser.parse_known_args(argv)[0]
    parser.set_defaults(**_preset(first.preset), **_of_tasks(first.task))
    flags, rest = parser.parse_known_args(argv)
    if rest:
        raise UserError(f"unknown argument {' '.join(rest)}: see --help, or --help_all for Hugging Face's flags")
    check_flag_values(flags)
    flags.given = _given(parser, argv) | _preset(flags.preset).keys()
    return flags


def _given(parser: HfArgumentParser, argv: list[str]) -> frozenset[str]:
    """Names of the flags that ``argv`` sets, in whatever spelling."""
    unset = object()
    parsed, _ = parser.parse_known_args(argv, Namespace(**{action.dest: unset for action in parser._actions}))
    return frozenset(name for name, value in vars(parsed).items() if value is not unset)


def _preset(name: str | None) -> dict:
    if name is not None and name not in PRESETS:
        raise UserError(f"--preset {name} is not known: use one of {', '.join(PRESETS)}")
    return PRESETS[name] if name else {}


def _of_tasks(names: str | None) -> dict:
    """Defaults that the tasks bring: the strongest label smoothing of any of them."""
    try:
        return {"label_smoothing_factor": max(task.label_smoothing for task in tasks_of(names))} if names else {}
    except DataError as error:
        raise UserError(str(error)) from error


def adapter_config(flags: Namespace) -> LDMoLEConfig:
    """`LDMoLEConfig` from parsed flags."""
    names = {f.name for f in dataclasses.fields(LDMoLEConfig)} - NOT_FLAGS
    values = {name: getattr(flags, name) for name in names}
    targets = values["target_modules"]
    # One word is 'all-linear' or a regular expression if it looks like one, else a name.
    if len(targets) == 1 and (targets[0] == "all-linear" or any(c in targets[0] for c in ".*[](|)\\^$")):
        values["target_modules"] = targets[0]
    return LDMoLEConfig(**values)


def build(flags: Namespace, group: type, **overrides: object):
    """One group's dataclass from parsed flags."""
    names = {f.name for f in dataclasses.fields(group) if f.init}
    return group(**{**{k: v for k, v in vars(flags).items() if k in names}, **overrides})
