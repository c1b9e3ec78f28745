"""The groups of settings that become flags: base model, data, adapter, layout, training.

Adapter settings are generated from `LDMoLEConfig`, so that no key is written down twice; training settings are
Hugging Face's own `TrainingArguments`.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field, make_dataclass

from transformers import TrainingArguments

from ldmole_ds.config import EXPERT_DISPATCH, PRESETS, QUANTIZATIONS, LDMoLEConfig
from ldmole_ds.layers.routers import ROUTERS
from ldmole_ds.tasks import SCORINGS, TASKS
from ldmole_ds.training.flags import field_with_help as _field

# Fields of the configuration that a run sets by itself.
NOT_FLAGS = {"base_model_name_or_path", "base_model_revision", "base_model_quantization", "projection_groups"}


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
        "such number inside one node; 1 without DeepSpeed or under ZeRO-0, which cannot partition experts).",
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
        if f.name in NOT_FLAGS:
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

    # The older versions that are supported know the older names alone.
    if "activation_checkpointing" not in {f.name for f in dataclasses.fields(TrainingArguments)}:
        gradient_checkpointing: bool = _field(
            False, "Compute each layer again in backward instead of keeping it.", aliases=["--activation_checkpointing"]
        )
        gradient_checkpointing_kwargs: dict | str | None = _field(
            None, "Keywords for torch.utils.checkpoint.", aliases=["--activation_checkpointing_kwargs"]
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"--peak_tflops must be above 0, got {self.peak_tflops}")
