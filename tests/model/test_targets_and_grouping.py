"""Which linear layers get experts, and which of them read the same tensor, on tiny models of several families."""

import logging

import pytest
import torch
import transformers as hf

from ldmole_ds.layers import AdaptedLinear
from ldmole_ds.model import get_ldmole_model
from ldmole_ds.model.grouping import find_input_groups
from ldmole_ds.model.targets import find_targets, linear_features
from tests.tiny import tiny_config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
MIXTRAL_SIZES = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}

LLAMA_LAYER = ["self_attn: q_proj k_proj v_proj", "self_attn: o_proj", "mlp: gate_proj up_proj", "mlp: down_proj"]
# Per family: model class, config, path of a layer, and its groups as "folder: names" (or full names) in call order.
FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES), "model.layers", LLAMA_LAYER),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, head_dim=8), "model.layers", LLAMA_LAYER),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES, head_dim=8), "model.layers", LLAMA_LAYER),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**SIZES, head_dim=8), "model.layers", LLAMA_LAYER),
    # Phi's MLP reads what its attention reads.
    "phi": (
        hf.PhiForCausalLM,
        hf.PhiConfig(**SIZES),
        "model.layers",
        ["self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1", "self_attn: dense", "mlp: fc2"],
    ),
    # Conv1D layers; q, k and v are one.
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(**GPT2_SIZES),
        "transformer.h",
        ["attn: c_attn", "attn: c_proj", "mlp: c_fc", "mlp: c_proj"],
    ),
    # The experts are no linear layers.
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**MIXTRAL_SIZES), "model.layers", LLAMA_LAYER[:2]),
}


def build(family):
    model_class, config, *_ = FAMILIES[family]
    return model_class(config)


def expected_groups(family):
    _, _, path, groups = FAMILIES[family]
    found = []
    for layer in range(2):
        for group in groups:
            folder, _, names = group.rpartition(": ")
            prefix = f"{path}.{layer}.{folder}." if folder else f"{path}.{layer}."
            found.append([prefix + name for name in names.split()])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of(family):
    model = build(family)
    groups = find_input_groups(model, find_targets(model, "all-linear"))
    assert sorted(groups) == sorted(expected_groups(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_forward_dispatches_once_per_group(family):
    model = get_ldmole_model(build(family), tiny_config())
    runs = []
    for group in model.input_groups:
        group.register_forward_hook(lambda module, args, output: runs.append(module.name))
    outputs = model(input_ids=torch.randint(3, 64, (2, 5)))
    assert outputs.logits.isfinite().all()
    assert sorted(runs) == sorted(group.name for group in model.input_groups)
    assert len(runs) == len(expected_groups(family))


@pytest.mark.parametrize("family", FAMILIES)
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


def test_a_template_carries_groups_over_to_layers_that_were_not_reached(monkeypatch):
    """A mixture-of-experts forward cannot run without data: the twin stops in layer 0."""
    from ldmole_ds.model import grouping

    seen, watch = [], grouping._watch
    monkeypatch.setattr(grouping, "_watch", lambda *args: seen.extend(found := watch(*args)) or found)
    model = build("mixtral")
    groups = find_input_groups(model, find_targets(model, "all-linear"))
    assert seen and all(name.startswith("model.layers.0.") for name, _ in seen)
    assert sorted(groups) == sorted(expected_groups("mixtral"))


def test_a_template_needs_all_its_members():
    model = build("mixtral")
    targets = find_targets(model, r".*\.(0\.self_attn\.[qkv]_proj|1\.self_attn\.[qk]_proj)")
    layer0, *layer1 = find_input_groups(model, targets)
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
