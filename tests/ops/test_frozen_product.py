"""A frozen layer and the experts' sum in one node, and the input that goes from product to product.

T tokens, D in_features, E experts, R rank.
"""

import pytest
import torch
from torch import nn

from ldmole_ds.ops.frozen_product import frozen_product, is_plain
from ldmole_ds.ops.low_rank_update import LowRankUpdate
from ldmole_ds.ops.shared_input import shared_input

D, E, R, OUT = 5, 3, 2, (4, 7, 3)


def inputs_of(t, dtype=torch.float64):
    """x (T, D), lora_A (G, E, R, D), p G times (E, T), lora_B G times (E, R, O)."""
    p = [torch.rand(E, t, dtype=dtype) * (torch.rand(E, t) < 0.5) for _ in OUT]
    B = [torch.randn(E, R, o, dtype=dtype) for o in OUT]
    tensors = [torch.randn(t, D, dtype=dtype), torch.randn(len(OUT), E, R, D, dtype=dtype), *p, *B]
    return [tensor.requires_grad_() for tensor in tensors]


def layers_of(bias, dtype=torch.float64):
    return [nn.Linear(D, o, bias=bias, dtype=dtype).requires_grad_(False) for o in OUT]


def handed_on(layers, x, lora_A, *rest, skipped=()):
    """The results of all layers; those in ``skipped`` are called apart, on x itself."""
    h, _, _, x_TD = shared_input(x, lora_A, None, None, hand_on=True)
    results = []
    for i, layer in enumerate(layers):
        update = LowRankUpdate(h[i], rest[i], rest[len(OUT) + i], 1.5)
        if i in skipped:
            results.append(update.add_to(layer(x), in_place=True))
            continue
        y, x_TD = frozen_product(layer, x_TD, update, (2, len(x) // 2), hand_on=i + 1 < len(layers))
        results.append(y.view(-1, OUT[i]))
    return results


def apart(layers, x, lora_A, *rest):
    h, _, _, _ = shared_input(x, lora_A, None, None)
    updates = [LowRankUpdate(h[i], rest[i], rest[len(OUT) + i], 1.5) for i in range(len(layers))]
    return [update.add_to_reference(layer(x)) for layer, update in zip(layers, updates, strict=True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("t", [6, 0])
@pytest.mark.parametrize("skipped", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_values_and_gradients_equal_the_reference(bias, t, skipped):
    layers, inputs = layers_of(bias), inputs_of(t)
    found, expected = handed_on(layers, *inputs, skipped=skipped), apart(layers, *inputs)
    torch.testing.assert_close(found, expected)
    cotangents = [torch.randn_like(value) for value in expected]
    grads, wanted = (torch.autograd.grad(value, inputs, cotangents) for value in (found, expected))
    for grad, value in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, value)
        assert t == 0 or value.abs().max() > 0


def test_gradcheck():
    layers = layers_of(True)
    assert torch.autograd.gradcheck(lambda *inputs: tuple(handed_on(layers, *inputs)), inputs_of(4))


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]], ids=str)
def test_results_that_no_loss_uses_leave_the_gradients_of_the_others(used):
    layers, inputs = layers_of(False), inputs_of(6)
    found, expected = handed_on(layers, *inputs), apart(layers, *inputs)
    cotangents = [torch.randn_like(expected[i]) for i in used]
    for values in (found, expected):
        values[:] = [values[i] for i in used]
    grads, wanted = (torch.autograd.grad(v, inputs, cotangents, allow_unused=True) for v in (found, expected))
    for grad, value, tensor in zip(grads, wanted, inputs, strict=True):
        grad, value = (torch.zeros_like(tensor) if g is None else g for g in (grad, value))
        torch.testing.assert_close(grad, value)


def test_backward_twice_gives_the_same_gradients():
    layers, inputs = layers_of(True), inputs_of(6)
    total = sum(y.square().sum() for y in handed_on(layers, *inputs))
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_an_input_without_gradient_is_not_given_one():
    layers, (x, *rest) = layers_of(True), inputs_of(6)
    x = x.detach()
    found = handed_on(layers, x, *rest)
    sum(y.sum() for y in found).backward()
    assert x.grad is None and all(tensor.grad is not None for tensor in rest)


def test_a_layer_is_plain_only_where_calling_it_is_one_product():
    x, (layer, *_) = torch.randn(2, D, dtype=torch.float64), layers_of(True)
    assert is_plain(layer, x)
    assert not is_plain(layer, x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_plain(layer, x)
    handle = layer.register_forward_pre_hook(lambda *_: None)
    assert not is_plain(layer, x)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_plain(layer, x)
    handle.remove()
    assert is_plain(layer, x)
    layer.forward = layer.forward
    assert not is_plain(layer, x)
    assert not is_plain(nn.Linear(D, D), x.float())  # trains

    class Other(nn.Linear):
        pass

    assert not is_plain(Other(D, D).requires_grad_(False), x.float())
