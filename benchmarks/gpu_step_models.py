"""The models of `gpu_step.py`, by the sizes of published ones, and the operations of their step.

``args`` is what `gpu_step.parse` returns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from authors_formulation import AuthorsModel
from peft_peer import LoraConfig, get_peft_model
from step_models import PROJECTIONS, wake
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from ldmole_ds import LDMoLEConfig, get_ldmole_model
from ldmole_ds.training.flops import TrainingFlops

LORA, AUTHORS, OURS, PLAIN = "PEFT LoRA r", "authors' formulation", "ours", "ours, routing kernel off"
_GROUPED = {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "tie_word_embeddings": True}
# The published configurations' sizes.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3-1.7b": lambda: Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_attention_heads=16, **_GROUPED
    ),
    "llama-3.2-3b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_attention_heads=24, **_GROUPED
    ),
    # Shows within seconds, and without a GPU, that the script runs.
    "tiny": lambda: Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_hidden_layers=2,
        tie_word_embeddings=True,
    ),
}


def base_model(args: argparse.Namespace, shape: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=getattr(torch, args.dtype))


def ours(args: argparse.Namespace, base: nn.Module, **changes: object) -> nn.Module:
    sizes = {"num_experts": args.experts, "r": args.rank, "lora_alpha": 2 * args.rank, "lora_dropout": args.dropout}
    config = LDMoLEConfig(**{**sizes, "lambda_hidden_size": args.lambda_hidden, **changes})
    return get_ldmole_model(base, config)


def build(args: argparse.Namespace, shape: str, inputs: dict) -> tuple[nn.Module, float, float]:
    """The variant's model, the operations of its step, and the experts that a token used in the first pass."""
    base, tokens = base_model(args, shape), inputs["input_ids"].numel()
    sequence = inputs["input_ids"].shape[1]
    work = {"tokens": tokens, "answers": tokens, "pairs": tokens * (sequence + 1) // 2}
    if args.variant == LORA:
        with torch.device("meta"):
            same = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=getattr(torch, args.dtype))
        flops = TrainingFlops(ours(args, same, router="lora")).of(**work, routing={})
        kinds = {"target_modules": PROJECTIONS, "lora_dropout": args.dropout, "bias": "none"}
        config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, **kinds)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        return wake(model), flops, 1.0
    model = wake(ours(args, base))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    routing = model.routing_summary()
    flops = TrainingFlops(model).of(**work, routing=routing)
    used = sum(row["experts_per_token"] for row in routing.values()) / len(routing)
    return AuthorsModel(model).train() if args.variant == AUTHORS else model, flops, used
