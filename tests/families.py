"""Tiny random base models of many families, and the plain dense model that a wrapped one is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import transformers as hf

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.model.adapter_io import gather_adapter_state, load_state
from ldmole_ds.parity.dense import DenseDispatcher
from tests.tiny import wake_experts

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3_MOE_SIZES = {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
GPT2_SIZES.update(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
BERT_SIZES = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}

MLA_SIZES = {**SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
MLA_SIZES.update(qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2)

LLAMA_LAYER = ["self_attn: q_proj k_proj v_proj", "self_attn: o_proj", "mlp: gate_proj up_proj", "mlp: down_proj"]


@dataclass(frozen=True)
class Family:
    """A model class, its tiny configuration, where its layers are, and the input groups of one layer.

    ``layer`` names each group as ``folder: names`` (or full names) in call order; ``others`` are groups outside layers.
    """

    model_class: type
    config: hf.PreTrainedConfig
    layers: str = "model.layers"
    layer: tuple[str, ...] = tuple(LLAMA_LAYER)
    others: tuple[str, ...] = ()
    head: str | None = None

    def build(self) -> hf.PreTrainedModel:
        torch.manual_seed(0)
        return self.model_class(self.config)

    def groups(self) -> list[list[str]]:
        found = [[name] for name in self.others]
        for index in range(2):
            for group in self.layer:
                folder, _, names = group.rpartition(": ")
                prefix = f"{self.layers}.{index}.{folder}." if folder else f"{self.layers}.{index}."
                found.append([prefix + name for name in names.split()])
        return found


CAUSAL = {
    "llama": Family(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "llama, tied": Family(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": Family(hf.MistralForCausalLM, hf.MistralConfig(**SIZES, head_dim=8)),
    "qwen3": Family(hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES, head_dim=8)),
    "gemma": Family(hf.GemmaForCausalLM, hf.GemmaConfig(**SIZES, head_dim=8)),
    # Phi's MLP reads what its attention reads.
    "phi": Family(
        hf.PhiForCausalLM,
        hf.PhiConfig(**SIZES),
        layer=("self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1", "self_attn: dense", "mlp: fc2"),
    ),
    # Latent attention: keys and values are expanded from one head, (B, 1, S, D). No layer has fused experts here.
    "deepseek_v3": Family(
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(**MLA_SIZES),
        layer=(
            "self_attn: q_a_proj kv_a_proj_with_mqa",
            "self_attn: q_b_proj",
            "self_attn: kv_b_proj",
            *LLAMA_LAYER[1:],
        ),
    ),
    # Conv1D layers; q, k and v are one. Its head is tied to its embeddings.
    "gpt2": Family(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(**GPT2_SIZES),
        "transformer.h",
        ("attn: c_attn", "attn: c_proj", "mlp: c_fc", "mlp: c_proj"),
    ),
    # The experts of these two are no linear layers.
    "mixtral": Family(
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        layer=tuple(LLAMA_LAYER[:2]),
    ),
    "qwen3_moe": Family(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**QWEN3_MOE_SIZES), layer=tuple(LLAMA_LAYER[:2])),
}
CLASSIFIERS = {
    "llama, classifying": Family(
        hf.LlamaForSequenceClassification, hf.LlamaConfig(**SIZES, num_labels=3), head="score"
    ),
    # An encoder alone.
    "bert, classifying": Family(
        hf.BertForSequenceClassification,
        hf.BertConfig(**BERT_SIZES, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "bert.encoder.layer",
        ("attention.self: query key value", "attention.output: dense", "intermediate: dense", "output: dense"),
        ("bert.pooler.dense",),
        head="classifier",
    ),
}
FAMILIES = {**CAUSAL, **CLASSIFIERS}


def awake_model(base: torch.nn.Module, config: LDMoLEConfig) -> LDMoLEModel:
    """The wrapped base with experts that are not zero."""
    model = get_ldmole_model(base, config, 7)
    wake_experts(model)
    return model


def dense_model(base: torch.nn.Module, config: LDMoLEConfig, model: LDMoLEModel) -> LDMoLEModel:
    """The plain way: each projection routes and computes on its own, by einsum, with the weights of ``model``."""
    dense = get_ldmole_model(base, replace(config, input_groups="single"))
    load_state(dense, gather_adapter_state(model), "the model under test")
    for group in dense.input_groups:
        group.dispatcher = DenseDispatcher()
    return dense


def gradients(model: LDMoLEModel) -> dict[str, torch.Tensor]:
    """All gradients by projection, whatever the groups are."""
    found = {}
    for group in model.input_groups:
        for g, path in enumerate(group.members):
            found[f"{path}.lora_A"], found[f"{path}.lora_B"] = group.lora_A.grad[g], group.lora_B[g].grad
            found[f"{path}.router"] = group.gate.grad[g]
    rest = [("lambda_mlps", model.lambda_mlps), ("base_model", model.base_model)]
    found.update({f"{k}.{n}": p.grad for k, m in rest for n, p in m.named_parameters() if p.requires_grad})
    return found
