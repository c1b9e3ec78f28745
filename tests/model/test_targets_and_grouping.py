"""Which linear layers get experts, and which of them read the same tensor, on tiny models of several families."""

import logging

import pytest
import torch
import transformers as hf

from ldmole_ds.layers import AdaptedLinear
from ldmole_ds.model import get_ldmole_model
from ldmole_ds.model.grouping import find_input_groups
from ldmole_ds.model.targets import find_targets, linear_features
from tests.families import CAUSAL, SIZES
from tests.tiny import tiny_config


def build(family):
    return CAUSAL[family].build()


@pytest.mark.parametrize("family", CAUSAL)
def test_groups_of(family):
    model = build(family)
    groups = find_input_groups(model, find_targets(model, "all-linear"))
    assert sorted(groups) == sorted(CAUSAL[family].groups())


@pytest.mark.parametrize("family", CAUSAL)
def test_all_linear_never_takes_the_head(family):
    model = build(family)
    head = model.get_output_embeddings()
    targets = find_targets(model, "all-linear")
    assert all(module is not head for module in targets.values())
    linear = {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, hf.pytorch_utils.Conv1D))}
    assert linear - set(targets) == {"lm_head"}


def test_all_linear_never_takes_a_classification_head():
    targets = find_targets(hf.LlamaForSequenceClassification(hf.LlamaConfig(**SIZES)), "all-linear")
    assert len(targets) == 14 and "score" not in targets


def test_linear_features_of_both_layouts():
    gpt2, llama = find_targets(build("gpt2"), "all-linear"), find_targets(build("llama"), "all-linear")
    assert linear_features(gpt2["transformer.h.0.mlp.c_fc"]) == (32, 128)
    assert linear_features(llama["model.layers.0.mlp.down_proj"]) == (48, 32)


@pytest.fixture
def mixtral(monkeypatch):
    """Its twin stops in layer 0, as that of a model whose forward depends on data."""
    model = build("mixtral")
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda *args: 1 / 0)
    return model


def test_a_template_carries_groups_over_to_layers_that_were_not_reached(monkeypatch, mixtral):
    from ldmole_ds.model import grouping

    seen, watch = [], grouping._watch
    monkeypatch.setattr(grouping, "_watch", lambda *args: seen.extend(found := watch(*args)) or found)
    groups = find_input_groups(mixtral, find_targets(mixtral, "all-linear"))
    assert seen and all(name.startswith("model.layers.0.") for name, _ in seen)
    assert sorted(groups) == sorted(CAUSAL["mixtral"].groups())


def test_a_template_needs_all_its_members(mixtral):
    targets = find_targets(mixtral, r".*\.(0\.self_attn\.[qkv]_proj|1\.self_attn\.[qk]_proj)")
    layer0, *layer1 = find_input_groups(mixtral, targets)
    assert len(layer0) == 3 and [len(group) for group in layer1] == [1, 1]


def test_single_mode():
    model = build("llama")
    targets = find_targets(model, "all-linear")
    assert find_input_groups(model, targets, "single") == [[name] for name in targets]


def test_a_module_without_a_config_gets_groups_of_one(caplog):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    with caplog.at_level(logging.WARNING):
        assert find_input_groups(model, find_targets(model, "all-linear")) == [["a"], ["b"]]
    assert "every projection routes and dispatches on its own" in caplog.text


def test_modules_that_are_never_called_are_named(caplog):
    """Mamba reads the weight of dt_proj without calling it."""
    config = hf.MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=2)
    get_ldmole_model(hf.MambaForCausalLM(config), tiny_config(target_modules="all-linear"))
    assert "2 of 8 target modules are not called by MambaForCausalLM on text, first" in caplog.text
    assert "mixer.dt_proj" in caplog.text and "--target_modules" in caplog.text
    caplog.clear()
    get_ldmole_model(hf.MambaForCausalLM(config), tiny_config(target_modules=["in_proj", "out_proj"]))
    get_ldmole_model(build("llama"), tiny_config())
    assert "not called" not in caplog.text


def test_targets_by_list_and_by_regular_expression():
    model = build("llama")
    by_list = find_targets(model, ["q_proj", "mlp.up_proj", "model.layers.1.mlp.down_proj"])
    assert list(by_list) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    by_pattern = find_targets(model, r"model\.layers\.1\..*_proj")
    assert len(by_pattern) == 7 and all(name.startswith("model.layers.1.") for name in by_pattern)
    assert list(find_targets(build("gpt2"), ["c_attn"])) == [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    assert list(find_targets(build("gpt2"), r".*\.1\.mlp\.c_fc")) == ["transformer.h.1.mlp.c_fc"]
    # An ending is a whole name, not a part of one.
    with pytest.raises(ValueError, match="match no linear layer"):
        find_targets(model, ["proj"])


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        ("q_proj", r"matched as a regular expression.*write it as a list, \['q_proj'\]"),
        (["q_proj", "query"], r"\['query'\] match no linear layer.*choose among \['down_proj', .*'v_proj'\]"),
        (["lm_head"], r"\['lm_head'\] match no linear layer"),
        (r".*\.query", "matches no linear layer.*choose among"),
        ("(q_proj", "is not a regular expression"),
    ],
)
def test_unmatched_targets_say_what_to_write(target_modules, message):
    with pytest.raises(ValueError, match=message):
        find_targets(build("llama"), target_modules)


def test_modules_to_save_are_not_adapted():
    model = build("llama")
    assert len(find_targets(model, "all-linear", ["mlp"])) == 8
    assert len(find_targets(model, "all-linear", ["layers.1"])) == 7
    with pytest.raises(ValueError, match="modules_to_save: no module of the base model is named 'pooler'"):
        get_ldmole_model(model, tiny_config(modules_to_save=["pooler"]))


def test_only_targets_are_replaced_and_the_base_is_frozen():
    model = get_ldmole_model(build("llama"), tiny_config(target_modules=["q_proj", "k_proj"]))
    adapted = [name for name, m in model.base_model.named_modules() if isinstance(m, AdaptedLinear)]
    assert adapted == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("q", "k")]
    assert not any(p.requires_grad for p in model.base_model.parameters())
    assert [group.name for group in model.input_groups] == [
        f"model.layers.{i}.self_attn.{{q_proj,k_proj}}" for i in (0, 1)
    ]
    with pytest.raises(ValueError, match="already has LD-MoLE experts"):
        get_ldmole_model(model.base_model, tiny_config())
