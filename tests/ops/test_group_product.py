"""A whole input group in one node against the references of its parts: with C's kernel, and with Triton's on a GPU, or
without one in its interpreter.

T tokens, D in_features, G projections, E experts, R rank, H hidden units.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ldmole_ds.ops import cpu_kernels
from ldmole_ds.ops import group_product as module
from ldmole_ds.ops.dropout import Dropped
from ldmole_ds.ops.fused_routing import SWITCH
from ldmole_ds.ops.group_product import GroupWeights, group_product, group_product_reference
from ldmole_ds.ops.routing_spec import RoutingSpec, RoutingSums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, E, R, H = 12, 5, 3, 7
# numpy's, of the interpreter: tokens without a number divide nothing by nothing, and the result is not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, params=["triton", "c"])
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="the kernels need triton: pip install triton")
        monkeypatch.setenv(SWITCH, "on")
    elif reason := cpu_kernels.why_not():
        pytest.skip(reason)
    else:
        monkeypatch.delenv(SWITCH, raising=False)
        monkeypatch.setitem(globals(), "DEVICE", "cpu")
    called, name = [], {"triton": "group_triton", "c": "group_cpu"}[request.param]
    plain = getattr(module, name)
    counting = SimpleNamespace(forward=lambda *args: called.append(0) or plain.forward(*args), backward=plain.backward)
    monkeypatch.setattr(module, name, counting)
    yield request.param
    assert called, "another kernel ran"


def case(t, out=(6, 9), bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    g = len(out)
    mlp = (random(H, D), random(H), random(1, H), random(1))
    biases = [random(o) if bias else None for o in out]
    lora_B = [random(E, R, o) for o in out]
    weights = GroupWeights([random(o, D) for o in out], biases, random(g, E, R, D), lora_B, random(g, E, D), mlp, 1.5)
    return random(t, D), weights, (torch.rand(t, generator=generator) > 0.3).to(DEVICE)


def trainable(weights):
    return [weights.lora_A, weights.gate, *weights.lambda_mlp, *weights.lora_B]


def with_grad(weights, dtype):
    def leaf(x):
        return x.detach().to(dtype).clone().requires_grad_()

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
    weights, x = with_grad(weights, dtype), x.to(dtype).clone().requires_grad_()
    if dropped is not None:
        dropped = Dropped((x.detach() * dropped * 2).to(dtype), dropped, 2.0)
    found = function(x, mask, weights, spec, dropped)
    sums = RoutingSums.of(found.sums)
    outputs = [found.outputs[i] for i in (range(len(found.outputs)) if used is None else used)]
    outputs += [sums.probs_JE, sums.sparsity_J, sums.router_z_J]
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    inputs = [x, *trainable(weights)]
    grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    grads = [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]
    other = [found.logits_GET, found.probs_GET, found.lam_T, sums.active_JE, sums.broken_J, found.live_units_H]
    return [y.detach() for y in [*outputs, *other]], grads


def assert_equals_reference(x, weights, mask, spec, **how):
    found = results(group_product, x, weights, mask, spec, torch.float32, **how)
    expected = results(group_product_reference, x, weights, mask, spec, torch.float64, **how)
    for ours, theirs in zip(found, expected, strict=True):
        for i, (value, wanted) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(value, wanted, 2e-5, 3e-6, f"{i}")
    return expected


def assert_close(value, wanted, rtol, atol, name):
    """``atol`` relative to the largest value."""
    assert value.shape == wanted.shape
    scale = max(wanted.double().abs().max().item(), 1.0) if wanted.numel() else 1.0
    torch.testing.assert_close(
        value.double(), wanted.double(), rtol=rtol, atol=atol * scale, msg=lambda message: f"{name}: {message}"
    )


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


def test_dropout():
    x, weights, mask = case(33)
    dropped = torch.rand(33, D, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.5
    assert_equals_reference(x, weights, mask, RoutingSpec(torch.float32, 2), dropped=dropped)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("t", [40, 0])
def test_bfloat16(t):
    """Routing is that of float32."""
    x, weights, mask = case(t)
    values, grads = results(group_product, x, weights, mask, RoutingSpec(torch.bfloat16, 2), torch.bfloat16)
    weights = with_grad(weights, torch.bfloat16)  # rounding what is read is not the node's error
    exact = RoutingSpec(torch.float64, 2)
    expected, expected_grads = results(group_product_reference, x.bfloat16(), weights, mask, exact, torch.float64)
    eps, outputs = torch.finfo(torch.bfloat16).eps, len(weights.frozen)
    for i, (value, wanted) in enumerate(zip(values, expected, strict=True)):
        of_routing = i >= outputs
        assert_close(value, wanted, *((2e-5, 3e-6) if of_routing else (4 * eps, 2 * eps)), f"value {i}")
    for i, (grad, wanted) in enumerate(zip(grads, expected_grads, strict=True)):
        assert grad.dtype == torch.bfloat16
        assert_close(grad, wanted, 4 * eps, 2 * eps, f"gradient {i}")


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_what_rounding_leaves_out_of_a_gradient(monkeypatch):
    """In bfloat16 router and lambda MLP hand two rows to the products where they hand one in float32."""
    handed, triton = {}, module.group_triton

    def watching(*args):
        found = triton.backward(*args)
        handed[args[6].dtype] = args[6].float()
        return found

    monkeypatch.setattr(module, "group_triton", SimpleNamespace(forward=triton.forward, backward=watching))
    x, weights, mask = case(33)
    weights = with_grad(weights, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        results(group_product, x.bfloat16(), weights, mask, RoutingSpec(dtype, 2), dtype)
    experts, routing = 2 * E * R, 2 * E + H
    assert len(handed[torch.bfloat16]) == experts + 2 * routing and len(handed[torch.float32]) == experts + routing
    wanted, (rounded, rest) = handed[torch.float32][experts:], handed[torch.bfloat16][experts:].split(routing)
    left_out = rest.abs() / rounded.abs().clamp(min=1e-12)
    assert rest.count_nonzero() > 0.5 * rounded.count_nonzero() and left_out.max() < 2**-7
    # They differ from those in float32, for what arrives comes through products in bfloat16.
    assert ((rounded + rest) - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("with_dropout", [False, True])
def test_both_halves_of_a_gradient_are_multiplied_in_float32(with_dropout, monkeypatch):
    """Of halves that almost cancel out, what remains is exact."""
    triton, halves = module.group_triton, []

    def cancelling(*args):
        grad_rows, sizes = args[6], args[7]
        grad_rows.zero_()
        rounded, rest = grad_rows[sizes.of_experts :].split(sizes.of_routing)
        rounded.copy_(torch.randn(rounded.shape, generator=torch.Generator().manual_seed(3)))
        rest.copy_(rounded * (2**-6 - 1))
        halves.append(rounded.double() + rest.double())
        return torch.zeros(2 * sizes.units + 1, device=grad_rows.device)

    monkeypatch.setattr(module, "group_triton", SimpleNamespace(forward=triton.forward, backward=cancelling))
    x, weights, _ = case(33)
    x, weights = x.bfloat16().requires_grad_(), with_grad(weights, torch.bfloat16)
    dropped = None
    if with_dropout:
        keep = torch.rand(33, D, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.5
        dropped = Dropped((x.detach() * keep * 2), keep, 2.0)
    found = group_product(x, None, weights, RoutingSpec(torch.bfloat16, 2), dropped)
    inputs = [x, weights.gate, weights.lambda_mlp[0]]
    grads = torch.autograd.grad(found.sums.sum(), inputs)
    (total,), read = halves, (x if dropped is None else dropped.values).detach().double()
    of_weights = total @ read
    stacked = torch.cat([weights.gate.flatten(0, 1), weights.lambda_mlp[0]]).detach().double()
    of_x = total.t() @ stacked
    of_x = of_x if dropped is None else of_x * dropped.keep * dropped.scale
    expected = [of_x, of_weights[: 2 * E].view_as(weights.gate), of_weights[2 * E :]]
    for grad, wanted in zip(grads, expected, strict=True):
        assert (grad.double() - wanted).norm() < 2 * torch.finfo(torch.bfloat16).eps * wanted.norm()


def test_gradients_of_sums_that_are_spread_out_in_memory():
    x, weights, mask = case(33)
    spec = RoutingSpec(torch.float32, 2)
    grads = []
    for function, dtype in ((group_product, torch.float32), (group_product_reference, torch.float64)):
        leaves = with_grad(weights, dtype)
        sums = function(x.to(dtype), mask, leaves, spec).sums
        assert torch.ones((), dtype=dtype).expand(sums.shape).stride() == (0, 0, 0)  # what sum() hands back
        grads.append(torch.autograd.grad(sums.sum(), [leaves.gate, *leaves.lambda_mlp]))
    for grad, wanted in zip(*grads, strict=True):
        assert_close(grad, wanted, 2e-5, 3e-6, "gradient")


def test_weights_with_gaps_in_memory():
    x, weights, mask = case(9)
    spec = RoutingSpec(torch.float32, 2)
    gaps = [torch.stack([w, w + 7], -1)[..., 0] for w in weights.lambda_mlp]
    assert not gaps[1].is_contiguous()
    found = group_product(x, mask, replace(weights, lambda_mlp=tuple(gaps)), spec)
    expected = group_product(x, mask, weights, spec)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("used", [(1,), (0,), ()], ids=str)
def test_outputs_that_nobody_uses(used):
    assert_equals_reference(*case(20), RoutingSpec(torch.float32, 2), used=used)


def test_frozen_x_and_frozen_adapters():
    x, weights, mask = case(9)
    spec = RoutingSpec(torch.float32, 2)
    leaves = with_grad(weights, torch.float32)
    sum(y.sum() for y in group_product(x, mask, leaves, spec).outputs).backward()
    assert x.grad is None and all(w.grad is not None for w in trainable(leaves))
    x_in = x.clone().requires_grad_()
    sum(y.sum() for y in group_product(x_in, mask, weights, spec).outputs).backward()
    expected = x.clone().requires_grad_()
    sum(y.sum() for y in group_product_reference(expected, mask, weights, spec).outputs).backward()
    torch.testing.assert_close(x_in.grad, expected.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not group_product(x, mask, leaves, spec).outputs[0].requires_grad


@pytest.mark.parametrize("where", ["x", "gate", "bias_in", "weight_in"])
def test_what_is_not_a_number_is_counted(where):
    x, weights, _ = case(8)
    broken = {"x": x, "gate": weights.gate, "bias_in": weights.lambda_mlp[1], "weight_in": weights.lambda_mlp[0]}[where]
    broken.view(-1)[0] = float("nan")
    found = group_product(x, None, weights, RoutingSpec(torch.float32, 2))
    expected = group_product_reference(x, None, weights, RoutingSpec(torch.float32, 2))
    counted = RoutingSums.of(found.sums).broken_J
    assert torch.equal(counted, RoutingSums.of(expected.sums).broken_J) and counted.sum() > 0
    assert torch.equal(found.probs_GET.isnan(), expected.probs_GET.isnan())
