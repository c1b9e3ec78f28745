"""In which dtype a run keeps the adapter's weights."""

from types import SimpleNamespace

import pytest
import torch

from ldmole_ds.training.ds_config import check_device
from ldmole_ds.training.placement import Place
from ldmole_ds.training.runtime import UserError
from ldmole_ds.training.setup import build_model
from tests.tiny import tiny_config, tiny_llama


@pytest.mark.parametrize(
    ("flag", "deepspeed", "expected"),
    [
        ("bf16", "zero2_bf16.json", torch.bfloat16),
        ("fp16", "zero2_fp16.json", torch.float16),
        # Nobody keeps a float32 copy: lambda's bias of -2.5 has no neighbour within 0.015 in bfloat16, and a gradient
        # scaler takes no float16 weights at all.
        ("bf16", None, torch.float32),
        ("fp16", None, torch.float32),
        (None, None, torch.float32),
    ],
)
def test_half_precision_where_an_engine_keeps_float32_copies(flag, deepspeed, expected):
    training = {"bf16": flag == "bf16", "fp16": flag == "fp16", "deepspeed": deepspeed, "seed": 0}
    training |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    settings = {
        "training": SimpleNamespace(**training),
        "model": SimpleNamespace(model_name_or_path="tiny", revision="main", quantization="none"),
        "layout": SimpleNamespace(ep_size="1", expert_dispatch="tokens", dispatch_chunk_tokens=0),
    }
    data = SimpleNamespace(longest_row=8, check_positions=lambda most: None)
    places = [Place("here", "", 0)]
    model = build_model(tiny_llama().bfloat16(), tiny_config(), data, settings, places)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}


@pytest.mark.parametrize(
    ("supported", "asked", "message"),
    [
        (("bf16", "fp16"), "bf16", None),
        (("bf16", "fp16"), "fp16", None),
        (("bf16",), "bf16", None),
        (("bf16",), "fp16", "--fp16: DeepSpeed does not compute in float16 on this CPU: take --bf16 and its config"),
        ((), "fp16", "--fp16: DeepSpeed does not compute in float16 on this CPU: leave it out, for float32"),
        ((), "bf16", "--bf16: DeepSpeed does not compute in bfloat16 on this CPU: leave it out, for float32"),
        ((), None, None),
    ],
)
def test_an_engine_that_this_device_does_not_have(monkeypatch, supported, asked, message):
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(device, f"is_{name}_supported", lambda name=name: name in supported)
    flags = {name: name == asked for name in ("bf16", "fp16")}
    if message is None:
        check_device(**flags)
    else:
        with pytest.raises(UserError, match=f"^{message}$"):
            check_device(**flags)
