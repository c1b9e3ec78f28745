"""Dtypes of base and adapters, autocast, and what a seed decides."""

import pytest
import torch

from ldmole_ds.layers import ForwardContext
from ldmole_ds.model import LDMoLEModel, adapted_forward, get_ldmole_model
from tests.families import gradients
from tests.tiny import ragged_batch, tiny_config, tiny_llama, wake_experts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make(base_dtype=torch.float32, seed=7, **changes):
    model = get_ldmole_model(tiny_llama().to(base_dtype), tiny_config(**changes), seed)
    wake_experts(model)
    return model.train()


def step(model, seed=5):
    torch.manual_seed(seed)
    output = model(**ragged_batch())
    output.loss.backward()
    return output, gradients(model)


@pytest.fixture(scope="module")
def exact():
    output, grads = step(make())
    return output.loss.item(), torch.cat([g.flatten() for g in grads.values()])


@pytest.mark.parametrize("adapter_dtype", [None, *DTYPES])
@pytest.mark.parametrize("base_dtype", DTYPES.values(), ids=str)
def test_every_pair_of_dtypes_trains_nearly_as_float32(exact, base_dtype, adapter_dtype, tmp_path):
    model = make(base_dtype, adapter_dtype=adapter_dtype)
    expected = DTYPES[adapter_dtype] if adapter_dtype else base_dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    assert {p.dtype for p in model.base_model.parameters()} == {base_dtype}
    output, grads = step(model)
    assert output.logits.dtype == base_dtype and {g.dtype for g in grads.values()} == {expected}
    assert all(value.dtype == torch.float32 for value in output.aux_losses.values())
    loss, gradient = exact
    assert output.loss.item() == pytest.approx(loss, rel=1e-2)
    found = torch.cat([g.flatten().float() for g in grads.values()])
    # A token near the edge of an expert's support may fall to the other side of it.
    assert (found - gradient).norm() < 0.2 * gradient.norm()
    model.save_pretrained(tmp_path)
    loaded = LDMoLEModel.from_pretrained(tiny_llama().to(base_dtype), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**ragged_batch()).logits, model.eval()(**ragged_batch()).logits)


def test_under_autocast_the_routing_is_float32_and_gradients_arrive(monkeypatch, exact):
    contexts, inputs = [], []

    def keep(**kwargs):
        contexts.append(ForwardContext(**kwargs))
        return contexts[-1]

    monkeypatch.setattr(adapted_forward, "ForwardContext", keep)
    model = make()
    group = model.input_groups[1]
    group.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**ragged_batch())
    output.loss.backward()
    record = next(r for r in contexts[0].records if r.group == group.name)
    assert {t.dtype for t in (record.logits_TGE, record.probs_TGE, record.lam_T)} == {torch.float32}
    assert inputs[0].dtype == torch.bfloat16, "otherwise autocast has done nothing here"
    expected = inputs[0].float().flatten(0, 1) @ group.gate[0].t()
    torch.testing.assert_close(record.logits_TGE[:, 0], expected)
    found = torch.cat([g.flatten() for g in gradients(model).values()])
    assert (found - exact[1]).norm() < 0.2 * exact[1].norm()


def test_a_seed_decides_everything():
    """Twice the same run, dropout on, whatever was drawn before; and another one with another seed."""
    runs = {}
    for name, noise, seed, dropout_seed in (("a", 1, 7, 5), ("b", 2, 7, 5), ("seed", 1, 8, 5), ("dropout", 1, 7, 6)):
        torch.manual_seed(noise)
        torch.rand(noise)
        output, grads = step(make(seed=seed, lora_dropout=0.2), dropout_seed)
        runs[name] = output.loss, torch.cat([g.flatten() for g in grads.values()])
    assert torch.equal(runs["a"][0], runs["b"][0]) and torch.equal(runs["a"][1], runs["b"][1])
    assert len({runs[name][0].item() for name in ("a", "seed", "dropout")}) == 3


def test_wrapping_leaves_the_random_state_alone():
    base = tiny_llama()
    before = torch.get_rng_state()
    get_ldmole_model(base, tiny_config(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
