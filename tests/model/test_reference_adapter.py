"""Adapters in the authors' key layout, written here from a wrapped model and read into another one."""

import pytest
import torch
from safetensors.torch import save_file

from ldmole_ds.model import get_ldmole_model
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

MLP = {"weight_in": "0.weight", "bias_in": "0.bias", "weight_out": "2.weight", "bias_out": "2.bias"}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def authors_state(model):
    """One tensor per expert; under every layer its router, and a copy of the lambda MLPs of *every* width."""
    state = {}
    for group in model.input_groups:
        for g, path in enumerate(group.members):
            prefix = f"base_model.model.{path}."
            for i in range(group.num_experts):
                state[f"{prefix}lora_A{i}.weight"] = group.lora_A[g, i]
                state[f"{prefix}lora_B{i}.weight"] = group.lora_B[g][i].t()
            state[f"{prefix}lora_route.weight"] = group.gate[g]
            mlps = dict(model.lambda_mlps.items()) or {str(group.in_features): group.lambda_mlp}
            for width, mlp in mlps.items():
                for ours, theirs in MLP.items():
                    state[f"{prefix}sparsegen.mlp.proj_layers.{width}.{theirs}"] = getattr(mlp, ours)
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def logits(model):
    return model.eval()(**ragged_batch()).logits


@pytest.mark.parametrize("form", ["state", "safetensors", "bin"])
def test_same_logits_from_every_form(tmp_path, form):
    model = tiny_model()
    source = authors_state(model)
    if form == "safetensors":
        save_file(source, tmp_path / "adapter.safetensors")
        source = tmp_path / "adapter.safetensors"
    elif form == "bin":
        torch.save(source, tmp_path / "adapter.bin")
        source = str(tmp_path / "adapter.bin")
    other = get_ldmole_model(tiny_llama(), tiny_config(), seed=99)
    assert not torch.equal(logits(other), logits(model))
    other.load_reference_adapter(source)
    assert torch.equal(logits(other), logits(model))


def test_local_lambda_mlps():
    config = {"lambda_sharing": "per_layer", "input_groups": "single"}
    model = tiny_model(tiny_config(**config))
    state = authors_state(model)
    other = get_ldmole_model(tiny_llama(), tiny_config(**config), seed=99)
    other.load_reference_adapter(state)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="lambda MLP differs under .*lambda_sharing='per_layer'"):
        tiny_model().load_reference_adapter(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{Q_PROJ}.lora_A7.weight"), r"lacks .*q_proj\.lora_A7\.weight"),
        (lambda state: state.pop(f"{Q_PROJ}.lora_route.weight"), r"lacks .*q_proj\.lora_route\.weight"),
        (lambda state: state.update({f"{Q_PROJ}.lora_A8.weight": torch.zeros(4, 64)}), r"holds .*lora_A8.*no place"),
        (lambda state: state.update({"lm_head.lora_route.weight": torch.zeros(8, 64)}), r"holds .*lm_head.*no place"),
        (lambda state: state.update({f"{Q_PROJ}.lora_route.weight": torch.zeros(9, 64)}), r"shape \(9, 64\), expected"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    model = tiny_model()
    state = authors_state(model)
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_reference_adapter(state)


class Payload:
    def __reduce__(self):
        return (print, ("code from a file",))


def test_pickled_code_is_never_run(tmp_path, capsys):
    torch.save({"weights": Payload()}, tmp_path / "adapter.bin")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        tiny_model().load_reference_adapter(tmp_path / "adapter.bin")
    assert "code from a file" not in capsys.readouterr().out
