"""The experts' sum added in factors, against the sum written out.

T tokens, E experts, R rank, O out_features.
"""

import pytest
import torch

from ldmole_ds.ops.low_rank_update import LowRankUpdate

E, R, O = 4, 2, 5


def inputs_of(t=6, dtype=torch.float64):
    """y (2, t / 2, O), and about half of the routing weights zero."""
    y, h = torch.randn(2, t // 2, O, dtype=dtype), torch.randn(E * R, t, dtype=dtype)
    p = torch.rand(E, t, dtype=dtype) * (torch.rand(E, t) < 0.5)
    return [tensor.requires_grad_() for tensor in (y, h, p, torch.randn(E, R, O, dtype=dtype))]


def add(y, h, p, lora_B, in_place):
    # A leaf cannot be overwritten, and the frozen layer's output is none.
    return LowRankUpdate(h, p, lora_B, 1.5).add_to(y * 1, in_place)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("t", [6, 0])
def test_values_and_gradients_equal_the_reference(in_place, t):
    inputs = inputs_of(t)
    y, h, p, lora_B = inputs
    found, expected = add(*inputs, in_place), LowRankUpdate(h, p, lora_B, 1.5).add_to_reference(y)
    torch.testing.assert_close(found, expected)
    assert t == 0 or not torch.equal(found, y)
    cotangent = torch.randn_like(expected)
    grads, wanted = (torch.autograd.grad(value, inputs, cotangent) for value in (found, expected))
    for grad, value in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, value)


@pytest.mark.parametrize("in_place", [True, False])
def test_gradcheck(in_place):
    assert torch.autograd.gradcheck(lambda *inputs: add(*inputs, in_place), inputs_of())


def test_in_place_is_in_place_only_where_it_is_cheap_and_asked_for():
    _, h, p, lora_B = inputs_of()
    update = LowRankUpdate(h, p, lora_B, 1.5)
    y = torch.randn(2, 3, O, dtype=torch.float64)
    expected = update.add_to_reference(y)
    for values, in_place in ((y.clone(), False), (y.clone().view(2, 3, O), True)):
        before = values.clone()
        torch.testing.assert_close(update.add_to(values, in_place), expected)
        assert torch.equal(values, before)
    values = y.clone()
    assert update.add_to(values, True).data_ptr() == values.data_ptr()
    torch.testing.assert_close(values, expected)


def test_a_frozen_output_that_needs_no_gradient():
    y, *others = inputs_of()
    add(y.detach(), *others, True).sum().backward()
    assert y.grad is None and all(tensor.grad.abs().max() > 0 for tensor in others)


def test_a_gradient_that_is_not_contiguous():
    inputs = inputs_of()
    cotangent = torch.randn(O, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    grads = torch.autograd.grad(add(*inputs, True), inputs, cotangent)
    wanted = torch.autograd.grad(add(*inputs, True), inputs, cotangent.contiguous())
    for grad, value in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, value)


def test_float32_experts_beside_a_half_precision_base_and_under_autocast():
    _, h, p, lora_B = inputs_of(dtype=torch.float32)
    y = torch.randn(2, 3, O).bfloat16()
    update = LowRankUpdate(h, p, lora_B, 1.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = update.add_to(y, True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, y + update.add_to(torch.zeros(2, 3, O), True).bfloat16())
    found.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (h, p, lora_B))


def test_nothing_of_the_size_of_the_output_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y, h, p, lora_B = (tensor.detach().requires_grad_() for tensor in inputs_of(100))
        add(y.detach(), h, p, lora_B, True)
    assert sorted(map(tuple, kept)) == [(E, R, O), (E, 100), (E * R, 100)]
