"""Optimizer and scheduler are tried on one weight before training: what they refuse is then one sentence."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

_REFUSALS = (ImportError, RuntimeError, TypeError, ValueError)


def check_optimizer(args: TrainingArguments, model: Any) -> None:
    """Make both as the Trainer will; what comes from the DeepSpeed config is left to DeepSpeed.

    Raises:
        ValueError: Names the flag: a package is missing, or a setting is missing or out of range.
    """
    deepspeed = args.hf_deepspeed_config.config if args.deepspeed else {}
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weights, lr=args.learning_rate)
    if "optimizer" not in deepspeed:
        try:
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
            # Some come with the model's weights in their settings, some are made by functions of the model.
            if isinstance(kind, type) and not {"params", "model", "optimizer_dict"} & settings.keys():
                optimizer = kind(weights, **settings)
        except _REFUSALS as error:
            raise ValueError(f"--optim {args.optim.value} cannot be used: {error}") from error
    if "scheduler" not in deepspeed:
        try:
            get_scheduler(
                args.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=0,
                num_training_steps=max(args.max_steps, 1),
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
        except _REFUSALS as error:
            raise ValueError(
                f"--lr_scheduler_type {args.lr_scheduler_type.value} cannot be used: {error}; its settings go into "
                "--lr_scheduler_kwargs, such as '{\"num_decay_steps\": 10}'"
            ) from error
