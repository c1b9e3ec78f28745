"""The small model and the batches of the contract, the same on every rank and in every layout."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed.zero import gathered
from ldmole_ds.model import LDMoLEModel, get_ldmole_model

IDLE_EXPERT = 3


def small_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, hidden 64, vocabulary 128, random weights, float32."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attn_implementation="eager",
    )
    # The caller's random state stays as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def small_config(**changes) -> LDMoLEConfig:
    """All auxiliary losses on, no dropout."""
    values = {
        "num_experts": 8,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lambda_hidden_size": 16,
        "sparsity_loss_weight": 0.1,
        "router_z_loss_weight": 0.01,
        "load_balancing_loss_weight": 0.5,
    }
    return LDMoLEConfig(**{**values, **changes})


@torch.no_grad()
def wake_experts(model: LDMoLEModel, *, idle_expert: int | None = IDLE_EXPERT, std: float = 0.05) -> None:
    """B ~ N(0, std) by global expert, so that losing an expert shows; sharper gates, so that support varies by token.

    With ``idle_expert`` no token ever chooses that expert of the first group.
    """
    generator = torch.Generator()
    for index, group in enumerate(model.input_groups):
        held = group.topology.local_experts(group.num_experts)
        for g, b in enumerate(group.lora_B):
            generator.manual_seed(1000 * index + g)
            full = torch.randn(group.num_experts, *b.shape[1:], generator=generator) * std
            b.copy_(full[held.start : held.stop])
        if group.gate is not None:
            group.gate.mul_(4.0)
    gate = model.input_groups[0].gate
    if idle_expert is not None and gate is not None and gate.shape[1] > idle_expert:
        # Logit 0 beside three pairs of opposite logits of spread 9: one of each pair is positive, and together they
        # exceed 1 - lambda, which leaves no weight for the idle expert.
        gate.mul_(4.0)
        gate[:, idle_expert] = 0.0
        one, *others = [e for e in range(gate.shape[1]) if e != idle_expert]
        gate[:, others[0::2]] = -gate[:, others[1::2]]


def small_model(
    config: LDMoLEConfig | None = None,
    *,
    ep_size: int = 1,
    expert_dispatch: str = "tokens",
    base: LlamaForCausalLM | None = None,
) -> LDMoLEModel:
    """`small_llama` (or ``base``) with awake experts."""
    model = get_ldmole_model(base or small_llama(), config or small_config(), 7, ep_size, expert_dispatch)
    wake_experts(model)
    return model


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give ``target``, which ZeRO-3 may hold partitioned, the weights of ``source``. Collective."""
    values = dict(source.named_parameters())
    for name, param in target.named_parameters():
        with gathered([param], modifier_rank=0):
            param.data.copy_(values[name])


def ragged_batch(rows: int = 8, width: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """``rows`` left-padded sequences of 3 to ``width`` tokens; labels on the last two tokens of each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, width + 1, (rows,), generator=generator)
    ids = torch.randint(0, 128, (rows, width), generator=generator)
    positions = torch.arange(width)
    mask = (positions >= width - lengths.unsqueeze(1)).long()
    labels = torch.where((positions >= width - 2) & (mask == 1), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
