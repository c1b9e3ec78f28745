"""Plain LoRA merges into an ordinary model with the same outputs; what would change them is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ldmole_ds.layers import AdaptedLinear
from ldmole_ds.layers.routers import ROUTERS
from tests.families import CAUSAL, awake_model
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

LORA = {"router": "lora", "r": 4}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def real(values, batch):
    """Padding is not routed: there, and only there, the adapter is not in the outputs."""
    return values[batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", ["llama", "llama, tied", "phi", "gpt2", "qwen3_moe"])
def test_the_merged_model_is_an_ordinary_one(family, tmp_path):
    batch, bare = ragged_batch(), CAUSAL[family].build()
    model = awake_model(CAUSAL[family].build(), tiny_config(**LORA, modules_to_save=None))
    adapted = real(logits(model, batch), batch)
    base = model.base_model
    merged = model.merge_and_unload()
    assert merged is base and type(merged) is type(bare) and merged.state_dict().keys() == bare.state_dict().keys()
    assert not any(isinstance(m, AdaptedLinear) for m in merged.modules())
    assert not merged._forward_hooks and not merged._forward_pre_hooks
    assert "keys_to_ignore_at_inference" not in vars(merged.config)
    found = real(logits(merged, batch), batch)
    assert (found - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert (found - real(logits(bare, batch), batch)).abs().max() > 1e-2 * adapted.abs().max()
    merged.save_pretrained(tmp_path)
    assert torch.equal(real(logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch), batch), found)


def test_a_module_trained_in_full_is_merged_too():
    model, batch = tiny_model(tiny_config(**LORA, modules_to_save=["lm_head"])), ragged_batch()
    with torch.no_grad():
        model.base_model.lm_head.weight.mul_(2)
    adapted = real(logits(model, batch), batch)
    torch.testing.assert_close(real(logits(model.merge_and_unload(), batch), batch), adapted, rtol=1e-5, atol=1e-5)


def test_sums_are_rounded_once():
    """Float32 adapters on a bfloat16 base: the merged weight is the nearest bfloat16 of the exact sum."""
    model = tiny_model(tiny_config(**LORA, adapter_dtype="float32"), base=tiny_llama().bfloat16())
    layer = model.base_model.model.layers[1].mlp.down_proj
    group, before = layer.group, layer.weight
    update = 2.0 * group.lora_B[0][0].double().t() @ group.lora_A[0, 0].double()
    exact = (before.double() + update).bfloat16()
    merged = model.merge_and_unload().model.layers[1].mlp.down_proj.weight
    assert merged.dtype == torch.bfloat16
    assert (merged != exact).float().mean() < 1e-3 < (merged != before).float().mean()


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "lora"])
def test_a_mixture_is_refused_and_works_on(router):
    model, batch = tiny_model(tiny_config(router=router)), ragged_batch()
    expected = logits(model, batch)
    with pytest.raises(ValueError, match=f"router {router} cannot be merged: its routing weights depend on the token"):
        model.merge_and_unload()
    assert torch.equal(logits(model, batch), expected)


def test_an_overflow_is_refused_and_the_model_works_on():
    model, batch = tiny_model(tiny_config(**LORA, adapter_dtype="float32"), base=tiny_llama().half()), ragged_batch()
    with torch.no_grad():
        model.input_groups[-1].lora_B[0].fill_(1e6)
    expected = logits(model, batch)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: the merged weight overflows torch\.float16"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=0, equal_nan=True)


def test_a_quantised_base_is_refused():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    from tests.quantized_models import quantized_llama

    model = tiny_model(tiny_config(**LORA), base=quantized_llama("nf4"))
    with pytest.raises(ValueError, match="base model is quantised.*load it without quantization"):
        model.merge_and_unload()
