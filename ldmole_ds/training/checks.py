"""Combinations of model and training arguments that would train wrongly are refused, each with its remedy."""

from __future__ import annotations

import logging

from transformers import TrainingArguments

from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.ldmole_model import REENTRANT_REFUSED
from ldmole_ds.model.quantized import has_quantized_layers

logger = logging.getLogger(__name__)


def check_trainable(model: LDMoLEModel, args: TrainingArguments, zero_stage: int | None) -> None:
    """Refuse what cannot work.

    Args:
        model: The wrapped model.
        args: Of the Trainer.
        zero_stage: ZeRO stage of the DeepSpeed config, None without DeepSpeed.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    partitioned = any(group.partitioned for group in model.input_groups)
    flag, engine = ("bf16", "bfloat16") if args.bf16 else ("fp16", "float16")
    asked = model.adapter_config.adapter_dtype
    if zero_stage is not None and getattr(args, flag) and asked not in (None, engine):
        raise ValueError(
            f"adapter_dtype={asked} under --{flag}: DeepSpeed's {flag} engine casts every parameter; for {asked} "
            f"adapters on a half-precision base leave out --{flag} and load the base with --dtype bfloat16"
        )
    # Older versions of Transformers have the older names alone.
    name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    recompute, options = getattr(args, name, False), getattr(args, f"{name}_kwargs", None)
    if (options or {}).get("use_reentrant"):
        raise ValueError(REENTRANT_REFUSED)
    if args.torch_compile and (partitioned or recompute):
        raise ValueError(
            "--torch_compile can trace neither the exchange of tokens between ranks nor activation checkpointing: "
            "leave it out, or use --ep_size 1 without --activation_checkpointing"
        )
    if not args.average_tokens_across_devices:
        raise ValueError("--average_tokens_across_devices False would weight ranks unequally: leave it on")
    if partitioned and zero_stage is None:
        raise ValueError(
            f"ep_size={model.topology.ep_size} needs DeepSpeed, which knows which gradients not to average: add "
            "--deepspeed ds_configs/zero2.json, or use --ep_size 1"
        )
    if partitioned and zero_stage == 0:
        raise ValueError(
            f"ep_size={model.topology.ep_size} with ZeRO stage 0 would clip gradients wrongly and lose experts on "
            "save: use ds_configs/zero1.json or higher, or --ep_size 1"
        )
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            "even_batches false in --accelerator_config would leave ranks with more batches waiting forever for ranks "
            "with fewer: leave it out"
        )
    for name in ("split_batches", "dispatch_batches"):
        if args.world_size > 1 and getattr(args.accelerator_config, name):
            raise ValueError(
                f"{name} in --accelerator_config does not go with rows of different lengths, nor with batch sizes that "
                "count the rows of each rank: leave it out"
            )
    if getattr(args, "loss_type", "nll") == "dft":
        raise ValueError("--loss_type dft is not supported: the loss is the model's cross-entropy; use --loss_type nll")
    if zero_stage == 3 and args.should_log and has_quantized_layers(model):
        logger.warning(
            "ZeRO stage 3 saves no memory on a quantised base, whose layers keep whole weights from forward to "
            "backward: ds_configs/zero2.json needs less"
        )
