"""From parsed flags to settings, data and model: everything that can be wrong is found here, on every rank."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.trainer_pt_utils import AcceleratorConfig

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from ldmole_ds.tasks import demo_model_file
from ldmole_ds.tasks.demo import EMBEDDED
from ldmole_ds.training.argument_groups import DataArguments, LayoutArguments, LDMoLETrainingArguments, ModelArguments
from ldmole_ds.training.arguments import build
from ldmole_ds.training.batch import BatchArguments, accumulation_steps, batch_size_warmup, scaled_learning_rate
from ldmole_ds.training.data import ChoiceData, check_sources, load_choice_data
from ldmole_ds.training.placement import Place, fits_in_nodes
from ldmole_ds.training.runtime import agreed
from ldmole_ds.training.sft import SFTData, is_sft_data, load_sft_data


def resolve_ep_size(ep_size: str, num_experts: int, places: Sequence[Place]) -> int:
    """``auto``: the largest number that divides experts and ranks and keeps each EP group on one host.

    Args:
        ep_size: ``auto`` or a number.
        num_experts: E.
        places: Of every rank, by rank.

    Raises:
        ValueError: Not a number; or it does not divide ranks or experts.
    """
    world_size = len(places)
    if ep_size == "auto":
        dividing = [p for p in range(world_size, 0, -1) if not (num_experts % p or world_size % p)]
        return next(p for p in dividing if fits_in_nodes(p, places))
    if not ep_size.isdecimal() or int(ep_size) < 1:
        raise ValueError(f"--ep_size must be auto or a whole number of at least 1, got {ep_size!r}")
    size = int(ep_size)
    if world_size % size:
        fitting = [p for p in range(1, world_size + 1) if world_size % p == 0]
        raise ValueError(f"--ep_size {size} does not divide the {world_size} ranks of this job: use one of {fitting}")
    if num_experts > 1 and num_experts % size:
        fitting = [p for p in range(1, num_experts + 1) if num_experts % p == 0]
        raise ValueError(f"--num_experts {num_experts} is not divisible by --ep_size {size}: use one of {fitting}")
    return size


def build_settings(flags: Namespace, device: str) -> dict[str, Any]:
    """The argument groups, with the accelerate state that `runtime.start` has made."""
    overrides: dict[str, Any] = {
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "eval_do_concat_batches": True,
    }
    if device == "cpu":
        overrides["use_cpu"] = True
    if flags.output_dir is None:
        overrides["output_dir"] = "runs/train"
    if flags.max_eval_samples is None and not (flags.validation_file or flags.dataset_name or flags.task):
        overrides.update(eval_on_start=False)
    with agreed("training arguments"):
        batch, world_size = build(flags, BatchArguments), dist.get_world_size() if dist.is_initialized() else 1
        micro = flags.per_device_train_batch_size
        accumulation = accumulation_steps(batch, micro, flags.gradient_accumulation_steps, world_size)
        overrides["gradient_accumulation_steps"] = accumulation
        rows = micro * accumulation * world_size
        warmup = batch_size_warmup(batch)
        if warmup is not None:
            warmup.check(rows, world_size)
        if flags.deepspeed:
            overrides["accelerator_config"] = accelerator_config(flags.accelerator_config)
        overrides["learning_rate"] = scaled_learning_rate(batch, flags.learning_rate, rows)
        return {
            "model": build(flags, ModelArguments),
            "data": build(flags, DataArguments),
            "layout": build(flags, LayoutArguments),
            "batch": batch,
            "training": build(flags, LDMoLETrainingArguments, **overrides),
        }


def accelerator_config(value: str | dict | None) -> dict[str, Any]:
    """What ``--accelerator_config`` says, a JSON object or a file of one, with the state that `runtime.start` made.

    Raises:
        ValueError: It is neither.
    """
    try:
        if isinstance(value, str):
            value = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
        config = {**(value or {}), "use_configured_state": True}
        AcceleratorConfig(**config)  # refuses names that it does not know
        return config
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"--accelerator_config {value}: {error}; give a JSON object, or a file that holds one"
        ) from error


def model_source(model: ModelArguments) -> dict[str, Any]:
    """Where the base model is; the embedded one by default."""
    return {
        "name": model.model_name_or_path or str(demo_model_file()),
        "revision": model.revision,
        "token": model.token,
        "trust_remote_code": model.trust_remote_code,
    }


def load_data(settings: dict[str, Any]) -> tuple[Any, ChoiceData | SFTData]:
    """Tokenizer and datasets, checked on every rank."""
    tokenizer = data = None
    arguments = settings["data"]
    with agreed("tokenizer and data"):
        check_sources(arguments)
        try:
            tokenizer = load_tokenizer(**model_source(settings["model"]))
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        sft = is_sft_data(arguments)
        # One rank of each node tokenises; the others then find what it has written.
        waits = sft and os.environ.get("LOCAL_RANK", "0") != "0"
        if not waits:
            data = load_sft_data(arguments, tokenizer) if sft else load_choice_data(arguments, tokenizer)
    with agreed("data"):
        if waits:
            data = load_sft_data(arguments, tokenizer)
        if data.validation is None:
            settings["training"].eval_on_start = False
            if settings["training"].eval_strategy != "no":
                raise ValueError("--eval_strategy needs held-out rows: give --validation_file, or --eval_strategy no")
        training = settings["training"]
        if training.dataloader_drop_last and len(data.train) < training.train_batch_size * training.world_size:
            raise ValueError(
                f"{len(data.train)} training rows fill no batch of all ranks: leave out --dataloader_drop_last, or "
                "lower --per_device_train_batch_size"
            )
        if training.train_sampling_strategy == "batch_rebalance":
            raise ValueError("--train_sampling_strategy batch_rebalance is not supported: use group_by_length")
    return tokenizer, data


def compute_dtype(training: LDMoLETrainingArguments) -> str:
    """The dtype that most products of the run are in."""
    return "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"


def engine_dtype(training: LDMoLETrainingArguments) -> str:
    """The dtype that the engine casts parameters to, keeping float32 copies for the optimizer; float32 casts nothing.

    Without DeepSpeed there are no such copies: half-precision weights would lose the small updates.
    """
    return compute_dtype(training) if training.deepspeed else "float32"


def load_base(model: ModelArguments, training: LDMoLETrainingArguments) -> Any:
    """The base model; a quantised one multiplies in the dtype of the run."""
    dtype = compute_dtype(training)
    if dtype == "float32" and model.dtype != "auto":
        dtype = model.dtype
    return load_base_model(
        **model_source(model),
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        quantization=model.quantization,
        compute_dtype=dtype,
    )


def may_partition(training: LDMoLETrainingArguments) -> bool:
    """Whether experts can be spread over ranks: with DeepSpeed, from ZeRO stage 1 on (`check_trainable` says why)."""
    return bool(training.deepspeed) and training.hf_deepspeed_config.get_value("zero_optimization.stage", 0) != 0


def build_model(
    base: Any, config: LDMoLEConfig, data: ChoiceData | SFTData, settings: dict[str, Any], places: Sequence[Place]
) -> LDMoLEModel:
    """The wrapped model in the run's layout; adapters are float32 unless DeepSpeed's engine is bf16 or fp16."""
    training, source = settings["training"], settings["model"]
    data.check_positions(getattr(base.config, "max_position_embeddings", None))
    dtype = engine_dtype(training)
    ep_size = resolve_ep_size(settings["layout"].ep_size, config.num_experts, places)
    if settings["layout"].ep_size == "auto" and not may_partition(training):
        ep_size = 1
    name = source.model_name_or_path or f"{EMBEDDED}{demo_model_file().name}"
    config = replace(
        config,
        adapter_dtype=config.adapter_dtype or dtype,
        base_model_name_or_path=name,
        # The commit, where the model is from the hub: a branch moves on.
        base_model_revision=getattr(base.config, "_commit_hash", None) or source.revision,
        base_model_quantization=source.quantization,
    )
    return get_ldmole_model(
        base,
        config,
        training.seed,
        ep_size,
        settings["layout"].expert_dispatch,
        dispatch_chunk_tokens=settings["layout"].dispatch_chunk_tokens,
        tokens_per_rank=training.per_device_train_batch_size * data.longest_row,
        accumulation_steps=training.gradient_accumulation_steps,
    )
