"""Base models that are mixtures of experts: attention is adapted, and what is not is said once, with the reason."""

import logging

import pytest
import torch
import transformers as hf
from torch import nn

from ldmole_ds.layers import AdaptedLinear
from ldmole_ds.model import get_ldmole_model
from ldmole_ds.model.targets import find_targets, left_out_modules
from tests.families import CAUSAL, QWEN3_MOE_SIZES, SIZES, Family
from tests.tiny import tiny_config

ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"]
SHARED = {**QWEN3_MOE_SIZES, "shared_expert_intermediate_size": 24}


def said(caplog, base, **changes):
    """Log lines of wrapping the model, and the model."""
    with caplog.at_level(logging.WARNING, logger="ldmole_ds"):
        model = get_ldmole_model(base, tiny_config(**changes))
    return [record.getMessage() for record in caplog.records if "leaves" in record.getMessage()], model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_attention_is_adapted_and_the_rest_is_listed_once(caplog, family):
    lines, model = said(caplog, CAUSAL[family].build())
    adapted = [name for name, module in model.base_model.named_modules() if isinstance(module, AdaptedLinear)]
    assert adapted == ATTENTION
    kind = type(model.base_model.model.layers[0].mlp.experts).__name__
    numel = sum(p.numel() for layer in model.base_model.model.layers for p in layer.mlp.experts.parameters())
    (line,) = lines
    assert f"model.layers.*.mlp.experts (2 {kind} with {numel:,} parameters: fused experts)" in line
    assert "model.layers.*.mlp.gate (2" in line and "with 256 parameters: the base's own router)" in line
    assert line.count("parameters") == 2


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2", "phi"])
def test_nothing_is_said_where_nothing_is_left_out(caplog, family):
    assert said(caplog, CAUSAL[family].build())[0] == []


def test_nothing_is_said_about_what_was_not_asked_for(caplog):
    assert said(caplog, CAUSAL["mixtral"].build(), target_modules=["q_proj"])[0] == []


def test_the_router_of_the_base_trains_no_more_than_its_experts(caplog):
    _, model = said(caplog, CAUSAL["qwen3_moe"].build())
    assert not any(p.requires_grad for p in model.base_model.parameters())


def test_shared_experts_are_adapted_and_their_gate_only_on_demand():
    torch.manual_seed(0)
    base = hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**SHARED))
    targets = find_targets(base, "all-linear")
    in_mlp = {name.removeprefix("model.layers.0.mlp.") for name in targets if name.startswith("model.layers.0.mlp.")}
    assert in_mlp == {f"shared_expert.{p}_proj" for p in ("gate", "up", "down")}
    (line,) = [text for text in left_out_modules(base, targets) if "shared_expert_gate" in text]
    assert line.endswith("(2 Linear with 64 parameters: the base's own router)")
    named = find_targets(base, ["shared_expert_gate"])
    assert list(named) == [f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)]
    assert list(find_targets(base, r".*\.shared_expert_gate")) == list(named)


def test_a_dense_layer_among_mixtures_is_adapted():
    config = hf.Qwen3MoeConfig(**QWEN3_MOE_SIZES, mlp_only_layers=[1])
    model = get_ldmole_model(Family(hf.Qwen3MoeForCausalLM, config).build(), tiny_config())
    names = {name for group in model.input_groups for name in group.members}
    assert names == {*ATTENTION, *(f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down"))}
    assert ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"] in [g.members for g in model.input_groups]


class ListedExperts(nn.Module):
    """Experts as a list of modules, each called for the tokens it gets; one may get none."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        choice = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = choice == i
            if rows.any():
                out[rows] = expert(x[rows])
        return out


def test_experts_that_are_called_for_some_tokens_only_are_never_adapted(caplog):
    """A rank without a token for such a layer would not enter the exchange that its peers wait in."""
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    for layer in base.model.layers:
        layer.mlp = ListedExperts()
    (line,), model = said(caplog, base)
    assert "model.layers.*.mlp.experts.* (8 Linear with 8,192 parameters: called for some tokens only)" in line
    assert "model.layers.*.mlp.gate (2 Linear with 256 parameters: the base's own router)" in line
    assert {name for group in model.input_groups for name in group.members} == set(ATTENTION)
    assert model(input_ids=torch.randint(3, 128, (2, 5))).logits.isfinite().all()
    with pytest.raises(ValueError, match="matches no linear layer"):
        find_targets(base.base_model, r".*experts\.\d")


def test_a_frozen_classification_head_is_mentioned(caplog):
    base = hf.LlamaForSequenceClassification(hf.LlamaConfig(**SIZES, num_labels=3))
    (line,), _ = said(caplog, base)
    assert line.endswith("score (1 Linear with 96 parameters: a head, frozen: modules_to_save trains it)")
    caplog.clear()
    base = hf.LlamaForSequenceClassification(hf.LlamaConfig(**SIZES, num_labels=3))
    assert said(caplog, base, modules_to_save=["score"])[0] == []
