"""The stacked expert product against the sum written out expert by expert.

N tokens, D in_features, G projections, e experts, r rank, O_g out_features.
"""

import pytest
import torch

from ldmole_ds.ops import lora_experts, lora_experts_reference
from ldmole_ds.ops.lora_experts import experts_forward, experts_input_gradients, experts_weight_gradients

SCALING = 1.5
# N, D, e, r, O_g of each projection: one and three projections of unequal width, one expert, no token, odd sizes.
SHAPES = [
    (7, 5, 4, 2, [6]),
    (7, 5, 4, 2, [6, 3, 1]),
    (4, 3, 1, 2, [5]),
    (4, 3, 1, 1, [5, 2, 4]),
    (1, 1, 1, 1, [1]),
    (0, 5, 4, 2, [6, 3, 1]),
]


def inputs_of(n, d, e, r, out_sizes, dtype=torch.float64):
    """Random tokens and weights; about half of the routing weights are zero."""
    x = torch.randn(n, d, dtype=dtype)
    w = torch.rand(n, len(out_sizes), e, dtype=dtype) * (torch.rand(n, len(out_sizes), e) < 0.5)
    lora_A = torch.randn(len(out_sizes), e, r, d, dtype=dtype)
    lora_B = [torch.randn(e, r, o, dtype=dtype) for o in out_sizes]
    return [t.requires_grad_() for t in (x, w, lora_A, *lora_B)]


def run(function, x, w, lora_A, *lora_B):
    return function(x, w, lora_A, lora_B, SCALING)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_reference(shape):
    inputs = inputs_of(*shape)
    ours, expected = run(lora_experts, *inputs), run(lora_experts_reference, *inputs)
    assert ours.shape == (shape[0], sum(shape[4]))
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, inputs, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for grad, value in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape):
    assert torch.autograd.gradcheck(lambda *inputs: run(lora_experts, *inputs), inputs_of(*shape))


def test_by_hand():
    # x = (1, 2). Expert 0: A = (1, 0), B = 10, so B A x = 10. Expert 1: A = (0, 1), B = 100, so B A x = 200.
    # With weights 1/4 and 3/4 and scaling 2 the sum is 2 (2.5 + 150) = 305.
    x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.25, 0.75]]])
    lora_A = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    lora_B = [torch.tensor([[[10.0]], [[100.0]]])]
    assert lora_experts(x, w, lora_A, lora_B, 2.0).tolist() == [[305.0]]
    assert lora_experts_reference(x, w, lora_A, lora_B, 2.0).tolist() == [[305.0]]


def test_an_inactive_expert_adds_exactly_nothing():
    x, w, lora_A, *lora_B = (t.detach() for t in inputs_of(5, 4, 3, 2, [6]))
    w[:, :, 1] = 0.0
    before = lora_experts(x, w, lora_A, lora_B, SCALING)
    lora_A[:, 1], lora_B[0][1] = 1e6, 1e6
    assert torch.equal(lora_experts(x, w, lora_A, lora_B, SCALING), before)


def test_no_token_gives_zero_gradients_not_none():
    inputs = inputs_of(0, 5, 4, 2, [6, 3, 1])
    run(lora_experts, *inputs).sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
    assert all(not tensor.grad.any() for tensor in inputs[2:])


@pytest.mark.parametrize("frozen", ["x", "experts"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    inputs = inputs_of(7, 5, 4, 2, [6, 3, 1])
    cotangent = torch.randn(7, 10, dtype=torch.float64)
    expected = torch.autograd.grad(run(lora_experts, *inputs), inputs, cotangent)
    kept = [i for i in range(len(inputs)) if (i != 0 if frozen == "x" else i < 2)]
    some = [t.detach().requires_grad_(i in kept) for i, t in enumerate(inputs)]
    run(lora_experts, *some).backward(cotangent)
    for i, tensor in enumerate(some):
        if i in kept:
            torch.testing.assert_close(tensor.grad, expected[i])
        else:
            assert tensor.grad is None


def test_the_plain_forward_and_backward_are_those_of_the_autograd_function():
    """The dispatcher calls them on their own; rows of x and of its gradient may lie apart."""
    x, w, lora_A, *lora_B = inputs_of(7, 5, 4, 2, [6, 3])
    cotangent = torch.randn(7, 9, dtype=torch.float64)
    expected = torch.autograd.grad(lora_experts(x, w, lora_A, lora_B, SCALING), (x, w, lora_A, *lora_B), cotangent)
    with torch.no_grad():
        apart, grad_rows = torch.zeros(7, 6, dtype=x.dtype), torch.full((7, 6), 9.0, dtype=x.dtype)
        apart[:, :5] = x
        _, kept = experts_forward(apart[:, :5], w, lora_A, lora_B, SCALING)
        args = (kept, lora_A, lora_B, SCALING)
        grad_w, grad_h = experts_input_gradients(cotangent, *args, out_x=grad_rows[:, :5])
        grad_A, grad_B = experts_weight_gradients(cotangent, x, kept, grad_h, lora_A, lora_B, SCALING)
        assert (grad_rows[:, 5] == 9).all()
        for grad, value in zip((grad_rows[:, :5], grad_w, grad_A, *grad_B), expected, strict=True):
            torch.testing.assert_close(grad, value)
        assert torch.equal(experts_input_gradients(cotangent, *args)[0], grad_w)
