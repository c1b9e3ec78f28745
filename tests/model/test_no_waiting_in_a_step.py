"""A whole micro-step of a model, losses and recomputation included, waits for the device once and no more.

How that is seen without a GPU: `tests.layers.test_no_host_sync`, which looks at single layers.
"""

import contextlib

import pytest
import torch

from ldmole_ds.model import adapted_forward, aux_losses, get_ldmole_model
from tests.layers.test_no_host_sync import CUDA, DEVICE, no_synchronization
from tests.tiny import ragged_batch, tiny_config, tiny_llama


@pytest.fixture(autouse=True)
def reads(monkeypatch):
    """The one read, counted instead of done."""
    found = []
    monkeypatch.setattr(aux_losses, "raise_where_broken", lambda broken, layers: found.append(layers))
    if not CUDA:  # the meta device has no autocast
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    return found


def two_micro_steps(checkpointing=False, dtype=torch.bfloat16, adapter_dtype="float32"):
    config = tiny_config(lora_dropout=0.1, adapter_dtype=adapter_dtype)
    model = get_ldmole_model(tiny_llama().to(DEVICE, dtype), config).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = {name: value.to(DEVICE) for name, value in ragged_batch().items()}
    step = {"num_routed_tokens": torch.full((), 60, device=DEVICE), "gradient_accumulation_steps": 2}

    def micro_step():
        model(**batch, **step, use_cache=False).loss.backward()

    if CUDA:
        micro_step()  # the first launch compiles, which may wait
    with no_synchronization():
        micro_step()
        micro_step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# In one dtype a GPU runs groups in one node.
CASES = [{}, {"checkpointing": True}, {"dtype": torch.float32}, {"adapter_dtype": "bfloat16"}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_once(case, reads):
    two_micro_steps(**case)
    assert len(reads) == 2 + CUDA


def test_a_read_more_is_noticed(monkeypatch):
    plain = adapted_forward.auxiliary_losses

    def impatient(batches, *args, **kwargs):
        assert batches[0].num_tokens >= 0
        return plain(batches, *args, **kwargs)

    monkeypatch.setattr(adapted_forward, "auxiliary_losses", impatient)
    with pytest.raises(RuntimeError, match="synchroniz" if CUDA else "meta tensors"):
        two_micro_steps()
