"""A whole input group in one node against the references of its parts.

T tokens, D in_features, G projections, E experts, R rank, H hidden units.
"""

from dataclasses import replace

import pytest
import torch

from ldmole_ds.ops import cpu_kernels
from ldmole_ds.ops.group_product import GroupWeights, group_product, group_product_reference
from ldmole_ds.ops.routing_spec import RoutingSpec, RoutingSums

if reason := cpu_kernels.why_not():
    pytest.skip(reason, allow_module_level=True)

D, E, R, H = 12, 5, 3, 7


def case(t, out=(6, 9), bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    g = len(out)
    mlp = (random(H, D), random(H), random(1, H), random(1))
    biases = [random(o) if bias else None for o in out]
    lora_B = [random(E, R, o) for o in out]
    weights = GroupWeights([random(o, D) for o in out], biases, random(g, E, R, D), lora_B, random(g, E, D), mlp, 1.5)
    return random(t, D), weights, torch.rand(t, generator=generator) > 0.3


def trainable(weights):
    return [weights.lora_A, weights.gate, *weights.lambda_mlp, *weights.lora_B]


def with_grad(weights, dtype):
    def leaf(x):
        return x.to(dtype).clone().requires_grad_()

    return replace(
        weights,
        frozen=[w.to(dtype) for w in weights.frozen],
        biases=[None if b is None else b.to(dtype) for b in weights.biases],
        lora_A=leaf(weights.lora_A),
        lora_B=[leaf(b) for b in weights.lora_B],
        gate=leaf(weights.gate),
        lambda_mlp=tuple(leaf(w) for w in weights.lambda_mlp),
    )


def results(function, x, weights, mask, spec, dtype, dropped=None, used=None):
    """Results and gradients; the cotangents are the same for every function and dtype."""
    weights, x_in = with_grad(weights, dtype), x.to(dtype).clone().requires_grad_()
    x_TD = x_in if dropped is None else x_in * dropped.to(dtype)
    found = function(x_in, x_TD, mask, weights, spec)
    sums = RoutingSums.of(found.sums)
    outputs = [found.outputs[i] for i in (range(len(found.outputs)) if used is None else used)]
    outputs += [sums.probs_JE, sums.sparsity_J, sums.router_z_J]
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    inputs = [x_in, *trainable(weights)]
    grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    grads = [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]
    other = [found.logits_GET, found.probs_GET, found.lam_T, sums.active_JE, sums.broken_J, found.live_units_H]
    return [y.detach() for y in [*outputs, *other]], grads


def assert_equals_reference(x, weights, mask, spec, **how):
    found = results(group_product, x, weights, mask, spec, torch.float32, **how)
    expected = results(group_product_reference, x, weights, mask, spec, torch.float64, **how)
    for ours, theirs in zip(found, expected, strict=True):
        for i, (value, wanted) in enumerate(zip(ours, theirs, strict=True)):
            assert value.shape == wanted.shape
            scale = max(wanted.double().abs().max().item(), 1.0) if wanted.numel() else 1.0
            torch.testing.assert_close(value.double(), wanted.double(), rtol=2e-5, atol=3e-6 * scale, msg=f"{i}")
    return expected


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("t", "out"), [(1, (4,)), (31, (6, 9)), (32, (6, 9, 3)), (70, (5, 5)), (0, (6, 9))])
def test_values_and_gradients(t, out, bias, masked):
    x, weights, mask = case(t, out, bias)
    spec = RoutingSpec(torch.float32, 2)
    values, grads = assert_equals_reference(x, weights, mask if masked else None, spec)
    assert t < 31 or all(g.abs().max() > 0 for g in grads), "a gradient of nothing compares nothing"
    assert t < 31 or 0 < (values[-5] > 0).double().mean() < 1, "some weights are zero, and some are not"


@pytest.mark.parametrize("spec", [RoutingSpec(torch.float32, 2, False), RoutingSpec(torch.float32, E)], ids=str)
def test_padding_that_is_routed_and_no_sparsity_loss(spec):
    assert_equals_reference(*case(40)[:2], case(40)[2], spec)


def test_experts_that_read_another_x():
    x, weights, mask = case(33)
    dropped = (torch.rand(33, D, generator=torch.Generator().manual_seed(1)) > 0.5) * 2.0
    assert_equals_reference(x, weights, mask, RoutingSpec(torch.float32, 2), dropped=dropped)


def test_weights_with_gaps_in_memory():
    x, weights, mask = case(9)
    spec = RoutingSpec(torch.float32, 2)
    gaps = [torch.stack([w, w + 7], -1)[..., 0] for w in weights.lambda_mlp]
    assert not gaps[1].is_contiguous()
    found = group_product(x, x, mask, replace(weights, lambda_mlp=tuple(gaps)), spec)
    expected = group_product(x, x, mask, weights, spec)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("used", [(1,), (0,), ()], ids=str)
def test_outputs_that_nobody_uses(used):
    assert_equals_reference(*case(20), RoutingSpec(torch.float32, 2), used=used)


def test_frozen_x_and_frozen_adapters():
    x, weights, mask = case(9)
    spec = RoutingSpec(torch.float32, 2)
    leaves = with_grad(weights, torch.float32)
    sum(y.sum() for y in group_product(x, x, mask, leaves, spec).outputs).backward()
    assert x.grad is None and all(w.grad is not None for w in trainable(leaves))
    x_in = x.clone().requires_grad_()
    sum(y.sum() for y in group_product(x_in, x_in, mask, weights, spec).outputs).backward()
    expected = x.clone().requires_grad_()
    sum(y.sum() for y in group_product_reference(expected, expected, mask, weights, spec).outputs).backward()
    torch.testing.assert_close(x_in.grad, expected.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not group_product(x, x, mask, leaves, spec).outputs[0].requires_grad


@pytest.mark.parametrize("where", ["x", "gate", "bias_in", "weight_in"])
def test_what_is_not_a_number_is_counted(where):
    x, weights, _ = case(8)
    broken = {"x": x, "gate": weights.gate, "bias_in": weights.lambda_mlp[1], "weight_in": weights.lambda_mlp[0]}[where]
    broken.view(-1)[0] = float("nan")
    found = group_product(x, x, None, weights, RoutingSpec(torch.float32, 2))
    expected = group_product_reference(x, x, None, weights, RoutingSpec(torch.float32, 2))
    counted = RoutingSums.of(found.sums).broken_J
    assert torch.equal(counted, RoutingSums.of(expected.sums).broken_J) and counted.sum() > 0
    assert torch.equal(found.probs_GET.isnan(), expected.probs_GET.isnan())
