"""One product for all that reads an input, against product by product.

T tokens, D in_features, G projections, E experts, R rank, H hidden units.
"""

import itertools

import pytest
import torch

from ldmole_ds.ops import shared_input as module
from ldmole_ds.ops.shared_input import shared_input, shared_input_reference

G, E, R, H = 2, 3, 2, 5
GIVEN = list(itertools.product([True, False], repeat=3))


def inputs_of(t=7, d=3, dtype=torch.float64):
    shapes = [(t, d), (G, E, R, d), (G, E, d), (H, d), (H,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def call(function, given, x, lora_A, gate, weight, bias):
    experts, router, lam = given
    h, *others = function(x, lora_A if experts else None, gate if router else None, (weight, bias) if lam else None)
    others = others[:2]  # x itself comes last
    assert [result is not None for result in (h, *others)] == list(given)
    return tuple(result for result in (*(h or ()), *others) if result is not None)


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("t", [7, 1, 0])
def test_values_and_gradients_equal_the_reference(given, t):
    inputs = inputs_of(t)
    found, expected = call(shared_input, given, *inputs), call(shared_input_reference, given, *inputs)
    if not any(given):
        return
    cotangents = [torch.randn_like(value) for value in expected]
    grads = torch.autograd.grad(found, inputs, cotangents, allow_unused=True)
    wanted = torch.autograd.grad(expected, inputs, cotangents, allow_unused=True)
    torch.testing.assert_close(found, expected)
    for grad, value in zip(grads, wanted, strict=True):
        assert (grad is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(grad, value)
            assert t == 0 or value.abs().max() > 0


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *inputs: call(shared_input, (True,) * 3, *inputs), inputs_of())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_router_and_lambda_in_float32(dtype):
    inputs = inputs_of(dtype=dtype)
    *h, logits, hidden = call(shared_input, (True,) * 3, *inputs)
    assert [t.dtype for t in (*h, logits, hidden)] == [dtype, dtype, torch.float32, torch.float32]
    x, _, gate, weight, bias = (t.detach().float() for t in inputs)
    torch.testing.assert_close(logits, gate.flatten(0, 1) @ x.t())
    torch.testing.assert_close(hidden, (weight @ x.t() + bias.unsqueeze(1)).relu())
    expected = call(shared_input_reference, (True,) * 3, *inputs)
    cotangents = [torch.randn_like(value) for value in expected]
    grads = torch.autograd.grad((*h, logits, hidden), inputs, cotangents)
    wanted = torch.autograd.grad(expected, inputs, cotangents)
    for grad, value, tensor in zip(grads, wanted, inputs, strict=True):
        assert grad.dtype == tensor.dtype == dtype
        assert (grad.float() - value.float()).norm() <= 0.02 * value.float().norm()


def test_what_needs_no_gradient_gets_none():
    x, *weights = inputs_of()
    for frozen in ([x], weights):
        some = [t.detach().requires_grad_(all(t is not f for f in frozen)) for t in (x, *weights)]
        sum(result.sum() for result in call(shared_input, (True,) * 3, *some)).backward()
        assert [t.grad is not None for t in some] == [t.requires_grad for t in some]


def test_only_x_and_the_hidden_units_are_kept():
    """Nothing else of the size of the tokens: neither h nor the logits, nor x in another dtype."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        shared_input(*(lambda x, a, g, w, b: (x, a, g, (w, b)))(*inputs_of(50, dtype=torch.bfloat16)))
    assert sorted(tuple(t.shape) for t in kept if 50 in t.shape) == [(H, 50), (50, 3)]


def bf16_case(experts):
    torch.manual_seed(0)
    inputs = [t.detach().requires_grad_() for t in inputs_of(40, 16, torch.bfloat16)]
    generator = torch.Generator().manual_seed(1)

    def run(device="cpu", dtype=torch.bfloat16, function=shared_input):
        moved = [t.detach().to(device, dtype).requires_grad_() for t in inputs]
        results = call(function, (experts, True, True), *moved)
        generator.manual_seed(1)
        cotangents = [torch.randn(r.shape, generator=generator).to(r) for r in results]
        grads = torch.autograd.grad(results, moved, cotangents, allow_unused=True)
        return [t.detach().cpu().double() for t in (*results, *grads) if t is not None]

    return run


@pytest.mark.parametrize("experts", [False, True])
def test_products_on_tensor_cores_give_the_same_numbers(monkeypatch, experts):
    """Their way, on a CPU: float32 products of bfloat16 numbers, and gradients as sums of two bfloat16 numbers."""
    run = bf16_case(experts)
    exact, plain = run(dtype=torch.float64, function=shared_input_reference), run()
    asked = []
    monkeypatch.setattr(module, "_on_tensor_cores", lambda x, weights: asked.append(len(weights)) or True)
    found = run()
    assert asked == [2, 2]
    for ours, theirs, value in zip(found, plain, exact, strict=True):
        assert (ours - value).norm() <= 1.05 * (theirs - value).norm() + 1e-6 * value.norm()


def test_a_gradient_in_two_parts_keeps_sixteen_bits():
    grad = torch.randn(50, 20) * torch.logspace(-20, 20, 20)
    parts = module._in_two(grad, torch.bfloat16)
    first, second = parts.float().split(50)
    assert ((first + second - grad).abs() <= 2.0**-16 * grad.abs()).all()
    assert not ((first - grad).abs() <= 2.0**-12 * grad.abs()).all(), "one part alone must not do"


@pytest.mark.gpu
def test_tensor_cores():
    run = bf16_case(False)
    exact = run(dtype=torch.float64, function=shared_input_reference)
    for found, value in zip(run("cuda"), exact, strict=True):
        is_rounded = value.shape != exact[0].shape and value.shape != exact[1].shape
        assert (found - value).norm() <= (4e-3 if is_rounded else 1e-6) * value.norm()
