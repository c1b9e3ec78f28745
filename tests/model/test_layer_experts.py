"""Expert counts that differ between layers (MoLA)."""

import pytest
import torch

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.layer_experts import expert_counts
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model


def names(layers):
    return [f"model.layers.{i}.mlp.up_proj" for i in range(layers)]


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ([2, 4, 6, 8], 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ([2, 4, 6, 8], 28, [2] * 7 + [4] * 7 + [6] * 7 + [8] * 7),
        ([2, 4, 6, 8], 6, [2, 2, 4, 6, 6, 8]),
        ([8, 8, 8, 8], 4, [8] * 4),
        (None, 3, [5, 5, 5]),
    ],
)
def test_counts_go_up_with_the_layers(pattern, layers, expected):
    config = LDMoLEConfig(num_experts=5, experts_per_layer=pattern)
    assert list(expert_counts(config, names(layers)).values()) == expected


def test_layers_are_found_in_gpt2s_names_too():
    found = expert_counts(
        LDMoLEConfig(experts_per_layer=[2, 8]), ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"]
    )
    assert list(found.values()) == [2, 8]


def test_what_cannot_be_spread_is_refused():
    config = LDMoLEConfig(experts_per_layer=[2, 4])
    with pytest.raises(ValueError, match=r"projector is in no numbered layer.*target_modules"):
        expert_counts(config, [*names(2), "projector"])
    with pytest.raises(ValueError, match="2 counts, but the model has 1 layers"):
        expert_counts(config, names(1))
    with pytest.raises(ValueError, match="whole numbers of at least 1"):
        LDMoLEConfig(experts_per_layer=[2, 0])
    with pytest.raises(ValueError, match="router lora"):
        LDMoLEConfig(router="lora", experts_per_layer=[2, 2])


def test_num_experts_is_the_largest_count():
    assert LDMoLEConfig.preset("mola-2468").num_experts == 8


def test_presets_are_complete_configurations():
    assert LDMoLEConfig.preset("llama-3.2-3b").lambda_hidden_size == 512
    assert LDMoLEConfig.preset("sparse", target_num_experts=3).target_num_experts == 3
    with pytest.raises(ValueError, match="use one of qwen3-1.7b"):
        LDMoLEConfig.preset("large")


def test_a_model_with_both_counts_trains_and_comes_back(tmp_path):
    config = tiny_config(router="topk", topk=2, experts_per_layer=[2, 8])
    model, batch = tiny_model(config).train(), ragged_batch()
    model(**batch).loss.backward()
    assert [group.num_experts for group in model.input_groups] == [2] * 4 + [8] * 4
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for row in model.routing_summary().values():
        assert row["experts_per_token"] == 2.0
    model.save_pretrained(tmp_path)
    loaded = LDMoLEModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
