"""The models that `step.py` and `gpu_step.py` compare, their step, and the check that ours and the authors' are equal.

``args`` is what `step.parse` returns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from authors_formulation import AllExpertsLinear, AuthorsModel, OneProductLinear
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from ldmole_ds import LDMoLEConfig, get_ldmole_model
from ldmole_ds.ops import matrix_products

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FROZEN, LORA, LORA_WIDE, OURS = "frozen base", "PEFT LoRA r", "PEFT LoRA E*r", "ours"
OURS_BY_TORCH = "ours, products by PyTorch's library"
AUTHORS, KINDER = "authors' formulation", "the same, A as one product"


def base_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        tie_word_embeddings=True,
    )
    with torch.device(args.device):
        return Qwen3ForCausalLM(config).to(getattr(torch, args.dtype))


def lora(args: argparse.Namespace, r: int, dropout: float) -> nn.Module:
    from peft_peer import LoraConfig, get_peft_model  # what else is here needs no PEFT

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=PROJECTIONS, bias="none")
    return wake(get_peft_model(base_model(args), config, autocast_adapter_dtype=False))


def ours(args: argparse.Namespace, dropout: float, lambda_hidden: int) -> nn.Module:
    config = LDMoLEConfig(
        num_experts=args.experts,
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=dropout,
        lambda_hidden_size=lambda_hidden,
        sparsity_loss_weight=args.sparsity_loss_weight,
    )
    return wake(get_ldmole_model(base_model(args), config, 1))


def wake(model: nn.Module) -> nn.Module:
    """LoRA B starts at zero; values of a trained size make every gradient count."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.02)
    return model.train()


def models(args: argparse.Namespace, dropout: float, lambda_hidden: int) -> dict[str, Callable[[], nn.Module]]:
    """How to make each variant; ours in two where another library than PyTorch's choice multiplies."""
    two = args.device == "cpu" and args.dtype == "float32" and matrix_products.multiplies("auto")
    return {
        FROZEN: lambda: base_model(args).requires_grad_(False).train(),
        LORA: lambda: lora(args, args.rank, dropout),
        LORA_WIDE: lambda: lora(args, args.rank * args.experts, dropout),
        AUTHORS: lambda: AuthorsModel(ours(args, dropout, lambda_hidden)).train(),
        KINDER: lambda: AuthorsModel(ours(args, dropout, lambda_hidden), OneProductLinear).train(),
        **({OURS_BY_TORCH: lambda: ours(args, dropout, lambda_hidden)} if two else {}),
        OURS: lambda: ours(args, dropout, lambda_hidden),
    }


def batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (args.tokens // args.sequence, args.sequence)
    ids = torch.randint(args.vocab, shape, generator=generator).to(args.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(model, AuthorsModel):
        return model(**inputs)
    if isinstance(model, Qwen3ForCausalLM):
        embeds = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        mask, labels = inputs["attention_mask"], inputs["labels"]
        return model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss
    return model(**inputs, use_cache=False).loss


def step_of(model: nn.Module, inputs: dict[str, torch.Tensor], name: str = OURS) -> Callable[[], None]:
    """Forward and backward of the variant ``name``."""
    params = [p for p in model.parameters() if p.requires_grad]
    library = "torch" if name == OURS_BY_TORCH else "auto"

    def step() -> None:
        os.environ[matrix_products.SWITCH] = library
        for param in params:
            param.grad = None
        loss_of(model, inputs).backward()

    return step


def check_equal(args: argparse.Namespace) -> dict[str, float]:
    """Loss and gradients of the authors' formulation, in both forms, are ours: the largest relative differences.

    Raises:
        AssertionError: They are not.
    """
    checks = [_differences(args, layer_class) for layer_class in (AllExpertsLinear, OneProductLinear)]
    return {key: max(check[key] for check in checks) for key in checks[0]}


def _differences(args: argparse.Namespace, layer_class: type[AllExpertsLinear]) -> dict[str, float]:
    mine, peer = ours(args, 0.0, 64), AuthorsModel(ours(args, 0.0, 64), layer_class).train()
    inputs = batch(args)
    losses = [loss_of(model, inputs) for model in (mine, peer)]
    for loss in losses:
        loss.backward()
    layers, pairs = iter(peer.layers), []
    for group in mine.input_groups:
        # The groups' members come in the order of the model, and so do the peer's layers.
        for i in range(len(group.members)):
            layer = next(layers)
            grads = (group.gate.grad[i], group.lora_A.grad[i], group.lora_B[i].grad)
            pairs += zip(grads, (layer.gate.grad, *layer.expert_grads()), strict=True)
    for width, mlp in mine.lambda_mlps.items():
        first, _, last = peer.mlps[width]
        pairs += [(mlp.weight_in.grad, first.weight.grad), (mlp.bias_out.grad, last.bias.grad)]
    worst = max(((grad - peer_grad).norm() / peer_grad.norm()).item() for grad, peer_grad in pairs)
    difference = abs(losses[0].item() / losses[1].item() - 1)
    limit = 1e-3 if args.dtype == "float32" else 0.1
    assert difference < limit and worst < limit, f"ours and the authors' differ: loss {difference}, gradients {worst}"
    return {"loss": difference, "gradients": worst}
