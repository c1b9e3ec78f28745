"""Dropout's mask: how often, how independent, how repeatable; and the gradient of exactly that mask."""

import pytest
import torch

from ldmole_ds.ops.dropout import dropout, keep_mask, with_mask


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1e-3])
def test_as_often_as_asked_and_without_bias(p):
    torch.manual_seed(0)
    n = 1_000_000
    y = dropout(torch.ones(1000, 1000), p)
    spread = (p * (1 - p) / n) ** 0.5
    assert abs((y == 0).double().mean() - p) < 5 * spread + 2**-17
    assert abs(y.double().mean() - 1) < 5 * spread / (1 - p)
    # Kept values are divided by the probability of being kept, which is a multiple of 2^-16.
    assert y.unique().tolist() == [0.0, pytest.approx(2**16 / (2**16 - round(p * 2**16)))]


def test_neighbours_and_rows_are_independent():
    torch.manual_seed(0)
    kept = keep_mask(torch.empty(2000, 512), 2**15).double() - 0.5
    for shift in range(1, 9):  # four values share one random number
        assert abs((kept[:, shift:] * kept[:, :-shift]).mean()) < 0.25 * 5 / 1000
    assert abs((kept[1:] * kept[:-1]).mean()) < 0.25 * 5 / 1000


def test_one_state_of_the_generator_one_mask():
    x = torch.randn(3, 7)  # not a multiple of four values
    state = torch.get_rng_state()
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5), first) and not torch.equal(first, second)


def test_gradient_is_the_mask():
    x = torch.randn(50, 20, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.3)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(grad * x, y)
    assert 0 < (grad == 0).sum() < grad.numel()


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_values_and_mask_are_those_of_dropout(p):
    x, grad_y, grad_x = torch.randn(50, 20, requires_grad=True), torch.randn(50, 20), torch.randn(50, 20)
    state = torch.get_rng_state()
    y = dropout(x, p)
    torch.set_rng_state(state)
    found = with_mask(x, p)
    assert torch.equal(found.values, y) and not found.values.requires_grad
    (expected,) = torch.autograd.grad(y, x, grad_y)
    torch.testing.assert_close(found.add_gradient_(grad_x.clone(), grad_y), grad_x + expected)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(shape, dtype):
    y = dropout(torch.ones(shape, dtype=dtype), 0.5)
    assert y.shape == shape and y.dtype == dtype and set(y.unique().tolist()) <= {0.0, 2.0}


def test_everything_dropped():
    assert not dropout(torch.ones(100), 1.0).any()
