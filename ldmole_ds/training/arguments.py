"""The command line: six groups of settings, from flags, from a YAML or JSON file, or both.

Adapter settings are generated from `LDMoLEConfig`, so that no key is written down twice; training settings are
Hugging Face's own `TrainingArguments`.
"""

from __future__ import annotations

import dataclasses
import typing
from argparse import SUPPRESS, Namespace
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from ldmole_ds.config import EXPERT_DISPATCH, PRESETS, QUANTIZATIONS, LDMoLEConfig
from ldmole_ds.layers.routers import ROUTERS
from ldmole_ds.tasks import SCORINGS, TASKS, DataError, tasks_of
from ldmole_ds.training.batch import BatchArguments
from ldmole_ds.training.flags import Formatter, raise_user_error
from ldmole_ds.training.flags import field_with_help as _field
from ldmole_ds.training.runtime import UserError
from ldmole_ds.training.settings_file import as_argv, read_settings_file

_NOT_FLAGS = {"base_model_name_or_path", "base_model_revision", "base_model_quantization", "projection_groups"}
# Shown by --help; every other TrainingArguments flag works too and is shown by --help_all.
_COMMON_TRAINING_FLAGS = {
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "activation_checkpointing", "eval_strategy",
    "eval_steps", "eval_on_start", "logging_steps", "save_strategy", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "report_to", "seed", "data_seed", "deepspeed", "ddp_timeout", "disable_tqdm",
    "push_to_hub",
}  # fmt: skip


@dataclass
class ModelArguments:
    """Which base model, and how it is loaded."""

    _argument_group_name: typing.ClassVar[str] = "base model"

    model_name_or_path: str | None = _field(
        None, "Hub id, folder, or GGUF file of a causal language model. Default: the embedded SmolLM2-135M-Instruct."
    )
    dtype: str = _field(
        "auto",
        "Dtype in which the base model is loaded; auto takes the checkpoint's.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = _field(
        "none",
        "Quantise the frozen linear layers but the head while loading (QLoRA): nf4 (4 bits) or int8. Needs the package "
        "bitsandbytes; best with ZeRO stages 0 to 2; not for GGUF files.",
        choices=QUANTIZATIONS,
    )
    attn_implementation: str | None = _field(None, "eager, sdpa, flash_attention_2, ...; default: the model's own.")
    revision: str = _field("main", "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = _field(False, "Run model code from the hub. Only for code you have read.")
    adapter_name_or_path: str | None = _field(
        None,
        "Train on from this adapter (folder of a run, checkpoint or adapter, or hub id), with any --ep_size. It brings "
        "its settings, and its base model unless --model_name_or_path is given.",
    )
    adapter_revision: str | None = _field(None, "Branch, tag or commit of an adapter on the hub.")
    token: str | None = _field(None, "Access token for gated hub models (default: the one stored by `hf auth login`).")


@dataclass
class DataArguments:
    """What is trained on."""

    _argument_group_name: typing.ClassVar[str] = "data"

    train_file: str | None = _field(
        None,
        "JSON Lines file: conversations (messages), prompt and completion, multiple choice in ARC's schema (question, "
        "choices, answerKey), or text and label; its first row tells which. Default: the embedded customer messages of "
        "ten domains.",
    )
    validation_file: str | None = _field(None, "Held-out file in the same schema.")
    dataset_name: str | None = _field(None, "Hub dataset in one of these schemas, instead of files.")
    task: str | None = _field(
        None,
        f"Benchmarks instead of files, one or several with commas: {', '.join(TASKS)} (docs/tasks.md). Multiple choice "
        "sets --label_smoothing_factor to 0.1.",
    )
    data_dir: str | None = _field(
        None, "Folder with TASK/SPLIT.jsonl in the schemas of the hub datasets; default: the hub."
    )
    mixture: str = _field(
        "size",
        "How several tasks share an epoch: size (every row once), equal (the same number of rows of each, small tasks "
        "repeated) or weights such as 1:2:1.",
    )
    scoring: str | None = _field(
        None,
        "letters: options are lettered in the prompt, the letter is the answer. cloze: the option's text is, its "
        "log-probability divided by its characters. Default: letters; clinc_domains: cloze.",
        choices=SCORINGS,
    )
    dataset_config_name: str | None = _field(None, "Configuration of the hub dataset.")
    train_split: str = _field("train", "Split of the hub dataset or task to train on.")
    validation_split: str | None = _field(
        None,
        "Split to evaluate on; default: validation of a hub dataset if it has one, the reported split of a task.",
    )
    text_column: str | None = _field(None, "Column with the text (default: text).")
    label_column: str | None = _field(None, "Column with the label (default: label).")
    label_words: str | None = _field(None, "JSON file {label: word to answer with}; default: the label itself.")
    max_length: int = _field(512, "Longest sequence in tokens; longer prompts lose their beginning, never the answer.")
    max_seq_length: int = _field(
        1024,
        "Longest row in tokens, of messages and prompt-completion rows: later turns are dropped, then the beginning of "
        "a prompt, never a part of an answer; a row whose answer alone is longer is left out. Both are counted.",
    )
    packing: bool = _field(
        False,
        "Put several conversations or prompt-completion rows into one row of max_seq_length tokens; none sees another "
        "(docs/sft.md).",
    )
    preprocessing_num_workers: int | None = _field(
        None, "Processes that tokenise messages, once per node; default: its cores, fewer for few rows."
    )
    max_train_samples: int | None = _field(None, "Use only the first N training rows.")
    max_eval_samples: int | None = _field(None, "Use only the first N held-out rows.")


@dataclass
class LayoutArguments:
    """How experts are laid out over ranks, and what happens to the output folder."""

    _argument_group_name: typing.ClassVar[str] = "expert parallelism and output"

    ep_size: str = _field(
        "auto",
        "Ranks that share one copy of all experts: a number that divides ranks and num_experts, or auto (the largest "
        "such number inside one node).",
    )
    network_interface: str = _field(
        "auto",
        "Network interface between hosts. auto: each host takes the one whose route leads to MASTER_ADDR for gloo, and "
        "NCCL finds its own. A name (or several with commas, of which each host takes the first that it has) holds for "
        "both.",
    )
    expert_dispatch: str = _field(
        "tokens",
        "tokens: tokens travel to the experts (all-to-all). weights: experts are gathered to the tokens. auto: the "
        "faster one, by sizes and a measurement of the link. Same results.",
        choices=EXPERT_DISPATCH,
    )
    dispatch_chunk_tokens: int = _field(
        0, "Dispatch at most so many tokens of a rank at once, which bounds memory under any skew. 0: all at once."
    )
    overwrite_output_dir: bool = _field(False, "Write into an output folder that already holds a run.")
    resume: str = _field(
        "never",
        "auto: go on from the newest whole checkpoint in --output_dir (also on other ranks, --ep_size or ZeRO stage), "
        "or start if there is none: one command for a job that the cluster stops and submits again. "
        "--resume_from_checkpoint names one.",
        choices=("never", "auto"),
    )


def _adapter_arguments() -> type:
    hints = typing.get_type_hints(LDMoLEConfig)
    fields = []
    for f in dataclasses.fields(LDMoLEConfig):
        if f.name in _NOT_FLAGS:
            continue
        if f.name == "target_modules":
            default = field(default_factory=lambda: ["all-linear"], metadata=dict(f.metadata))
            fields.append((f.name, list[str], default))
        else:
            choices = {"choices": tuple(ROUTERS)} if f.name == "router" else {}
            fields.append((f.name, hints[f.name], field(default=f.default, metadata={**f.metadata, **choices})))
    text = f"Named adapter settings, which any flag overrides: {', '.join(PRESETS)}; see docs/method.md."
    fields.append(("preset", str | None, _field(None, text)))
    namespace = {"_argument_group_name": "adapter", "__doc__": "The adapter: fields of `LDMoLEConfig`."}
    return make_dataclass("AdapterArguments", fields, namespace=namespace)


AdapterArguments = _adapter_arguments()


@dataclass
class LDMoLETrainingArguments(TrainingArguments):
    """Hugging Face's `TrainingArguments`, unchanged but for the defaults that make a run easy to read."""

    _argument_group_name: typing.ClassVar[str] = "training (Hugging Face TrainingArguments)"

    logging_steps: float = field(default=10, metadata={"help": "Log every N optimizer steps."})
    eval_on_start: bool = field(
        default=True, metadata={"help": "Measure held-out accuracy before training too (if there is held-out data)."}
    )
    log_per_layer: bool = _field(
        False,
        "Also write the routing of every projection at every log, one row each, to metrics_per_layer.csv beside "
        "metrics.csv (docs/reading-the-routing.md).",
    )
    peak_tflops: float | None = _field(
        None,
        "Peak of one device in 10^12 operations a second, for the log's mfu (model FLOPs utilisation); default: the "
        "dense bf16 peak of common cards, none on a CPU.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"--peak_tflops must be above 0, got {self.peak_tflops}")


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
            if action.dest in training and action.dest not in _COMMON_TRAINING_FLAGS or action.dest.startswith("no_"):
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
    names = {f.name for f in dataclasses.fields(LDMoLEConfig)} - _NOT_FLAGS
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
