"""Experts on a base in 4 or 8 bits: the same training as on plain layers that hold the dequantised weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.trainer_utils import validate_quantization_for_training

from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.model.base_model import load_base_model
from ldmole_ds.model.quantized import is_quantized
from tests.quantized_models import call_all_frozen_layers, dequantized_llama, quantized_layer, quantized_llama
from tests.tiny import ragged_batch, tiny_config, tiny_llama, wake_experts

KINDS = ("nf4", "fp4", "int8")


def wrapped(base, **changes) -> LDMoLEModel:
    model = get_ldmole_model(base, tiny_config(**changes), 7)
    wake_experts(model)
    return model.train()


def step(model) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient of one training step."""
    out = model(**ragged_batch())
    model.zero_grad()
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


@torch.no_grad()
def evaluate(model) -> torch.Tensor:
    logits = model.eval()(**ragged_batch()).logits
    model.train()
    return logits


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)).item()


def worst(result: dict, expected: dict) -> float:
    assert result.keys() == expected.keys()
    return max(relative(result[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_that_of_the_dequantised_base(kind):
    plain = step(wrapped(tiny_llama()))
    expected = step(wrapped(dequantized_llama(kind)))
    assert worst(step(wrapped(quantized_llama(kind))), expected) < 1e-5
    assert relative(plain["logits"], expected["logits"]) > 1e-3, "quantising must change the model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_an_evaluation_before_training_changes_nothing(kind, targets):
    """On CPUs with AVX512-BF16, bitsandbytes would repack 4-bit weights, adapted or not, and lose the gradient."""
    model = wrapped(quantized_llama(kind), target_modules=targets)
    evaluate(model)
    assert worst(step(model), step(wrapped(dequantized_llama(kind), target_modules=targets))) < 1e-5


def test_evaluation_of_a_4_bit_base_is_exact_and_of_int8_as_close_as_its_inputs_are_rounded():
    assert relative(evaluate(wrapped(quantized_llama("nf4"))), evaluate(wrapped(dequantized_llama("nf4")))) < 1e-5
    # On CPU int8 products round their input too, in eval mode only, to steps of max|x| / 127: an error of
    # step / sqrt(12) in rows whose maximum is about three times their root mean square, so 3 / (127 sqrt(12)) = 0.7 %.
    error = relative(evaluate(wrapped(quantized_llama("int8"))), evaluate(wrapped(dequantized_llama("int8"))))
    assert 1e-4 < error < 3e-2


def test_bfloat16():
    """Products in bfloat16 round alike; int8 weights are not rounded to bfloat16 in the same place."""
    for kind, tolerance in (("nf4", 1e-5), ("int8", 6e-2)):
        model = wrapped(quantized_llama(kind, torch.bfloat16).bfloat16(), adapter_dtype="bfloat16")
        expected = wrapped(dequantized_llama(kind).bfloat16(), adapter_dtype="bfloat16")
        call_all_frozen_layers(expected)
        assert all(p.dtype in (torch.bfloat16, torch.uint8, torch.int8) for p in model.parameters())
        assert worst(step(model), step(expected)) < tolerance


def test_adapters_take_the_dtype_in_which_the_layer_computes():
    def dtypes(base, **changes):
        groups = get_ldmole_model(base, tiny_config(**changes)).input_groups
        return {p.dtype for group in groups for p in group.parameters()}

    assert dtypes(quantized_llama("nf4", torch.bfloat16)) == {torch.bfloat16}
    assert dtypes(quantized_llama("nf4", torch.bfloat16), adapter_dtype="float32") == {torch.float32}
    assert dtypes(quantized_llama("nf4", None).bfloat16()) == {torch.bfloat16}
    assert dtypes(quantized_llama("int8")) == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_frozen_and_counted_in_weights(kind):
    model = wrapped(quantized_llama(kind))
    before = {name: p.detach().clone() for name, p in model.base_model.named_parameters()}
    step(model)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(p, before[name]) for name, p in model.base_model.named_parameters())
    assert model.num_parameters_by_kind() == wrapped(tiny_llama()).num_parameters_by_kind()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_activation_checkpointing(kind):
    expected = step(wrapped(quantized_llama(kind)))
    model = wrapped(quantized_llama(kind))
    model.gradient_checkpointing_enable()
    assert worst(step(model), expected) < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_state_dict_holds_parameters_only_and_loads(kind):
    """The scales of the frozen base would get into every checkpoint."""
    model = wrapped(quantized_llama(kind))
    step(model)
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    assert not model.load_state_dict(state, strict=True).missing_keys


# ---- through Hugging Face's loader ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_load_wrap_save_load(kind, folder, tmp_path):
    base = load_base_model(str(folder), quantization=kind)
    assert sum(is_quantized(m) for m in base.modules()) == 14 and not is_quantized(base.lm_head)
    model = wrapped(base, base_model_quantization=kind)
    validate_quantization_for_training(model)  # what the Trainer asks first
    # Groups are found on a twin without weights, and without bitsandbytes.
    assert [len(group.members) for group in model.input_groups] == [3, 1, 2, 1] * 2
    step(model)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    again = LDMoLEModel.from_pretrained(load_base_model(str(folder), quantization=kind), tmp_path)
    assert again.adapter_config.base_model_quantization == kind
    assert torch.equal(evaluate(again), evaluate(model))


def test_a_transposed_layer_of_gpt2(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = wrapped(load_base_model(str(tmp_path), quantization="nf4"))
    assert model.input_groups[0].members == ["transformer.h.0.attn.c_attn"]
    assert model.input_groups[0].out_features == [192]
    ids = torch.randint(0, 64, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- what cannot work ----


def test_a_base_repacked_by_an_evaluation_is_refused():
    base = quantized_llama("nf4")
    base.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj was repacked.*load the base anew"):
        get_ldmole_model(base, tiny_config())


def test_floating_storage_is_refused():
    import bitsandbytes as bnb

    base = quantized_llama("nf4")
    # Never moved to a device, so never quantised.
    base.model.layers[0].mlp.up_proj = bnb.nn.Linear4bit(64, 96, bias=False)
    with pytest.raises(ValueError, match=r"up_proj \(Linear4bit\) stores torch\.float32 values.*BitsAndBytesConfig"):
        get_ldmole_model(base, tiny_config())


def test_a_quantised_module_cannot_be_trained_in_full():
    base = tiny_llama()
    base.model.layers[0].mlp.up_proj = quantized_layer(base.model.layers[0].mlp.up_proj, "int8")
    with pytest.raises(ValueError, match="modules_to_save: 'up_proj' is quantised.*leave it out"):
        get_ldmole_model(base, tiny_config(modules_to_save=["up_proj"]))


def test_a_gguf_file_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"--quantization nf4 cannot quantise the GGUF file.*save_pretrained"):
        load_base_model(str(tmp_path / "model.gguf"), quantization="nf4")


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setattr("ldmole_ds.model.base_model.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes.*pip install bitsandbytes"):
        load_base_model(str(folder), quantization="int8")
