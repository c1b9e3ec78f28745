"""Active pairs alone against the sum written out expert by expert, and against the dense products.

N tokens, D in_features, G projections, e experts, r rank, O_g out_features.
"""

import pytest
import torch

from ldmole_ds.ops import grouped_experts as module
from ldmole_ds.ops import lora_experts, lora_experts_reference
from ldmole_ds.ops.grouped_experts import GROUPED
from ldmole_ds.ops.grouped_update import GroupedUpdate

SCALING = 1.5
# N, D, e, r, O_g of each projection.
SHAPES = [(7, 5, 4, 2, [6]), (9, 5, 6, 3, [6, 3, 1]), (4, 3, 1, 2, [5, 2]), (0, 5, 4, 2, [6, 3, 1])]


def _drawn(n, g, e):
    return torch.rand(n, g, e) < 0.4


def _one_expert(n, g, e):
    return torch.nn.functional.one_hot(torch.full((n, g), e // 2), e).bool()


def _an_idle_expert(n, g, e):
    return _drawn(n, g, e) & (torch.arange(e) != e - 1)


def _an_idle_projection(n, g, e):
    return _drawn(n, g, e) & (torch.arange(g) != g - 1).unsqueeze(1)


def _none(n, g, e):
    return torch.zeros(n, g, e, dtype=torch.bool)


ROUTINGS = [_drawn, _one_expert, _an_idle_expert, _an_idle_projection, torch.ones, _none]


def inputs_of(n, d, e, r, out_sizes, routing=_drawn):
    """x, who is active, weights of the active ones, lora_A, every lora_B."""
    x = torch.randn(n, d, dtype=torch.float64)
    active = routing(n, len(out_sizes), e).bool()
    w = torch.rand(int(active.sum()), dtype=torch.float64) + 0.1
    lora_A = torch.randn(len(out_sizes), e, r, d, dtype=torch.float64)
    lora_B = [torch.randn(e, r, o, dtype=torch.float64) for o in out_sizes]
    return active, [t.requires_grad_() for t in (x, w, lora_A, *lora_B)]


def call(function, active, x, w, lora_A, *lora_B, **kwargs):
    w_NGe = torch.zeros(active.shape, dtype=w.dtype).masked_scatter(active, w)
    return function(x, w_NGe, lora_A, lora_B, SCALING, **kwargs)


@pytest.fixture(params=[1 << 19, 100], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_reference(shape, routing):
    active, inputs = inputs_of(*shape, routing)
    ours = call(lora_experts, active, *inputs, products=GROUPED)
    expected = call(lora_experts_reference, active, *inputs)
    dense = call(lora_experts, active, *inputs)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours, dense, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, inputs, cotangent)
    for wanted in (expected, dense):
        for grad, value in zip(grads, torch.autograd.grad(wanted, inputs, cotangent), strict=True):
            torch.testing.assert_close(grad, value, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradcheck(shape):
    active, inputs = inputs_of(*shape)
    assert torch.autograd.gradcheck(lambda *inputs: call(lora_experts, active, *inputs, products=GROUPED), inputs)


def test_weights_of_inactive_experts_get_zero_gradient_and_their_experts_too():
    x, lora_A = torch.randn(3, 5), torch.randn(1, 3, 2, 5).requires_grad_()
    w, lora_B = torch.tensor([[0.5, 0.0, 0.5]] * 3).unsqueeze(1).requires_grad_(), torch.randn(3, 2, 4).requires_grad_()
    lora_experts(x, w, lora_A, [lora_B], SCALING, GROUPED).sum().backward()
    assert not w.grad[..., 1].any() and w.grad[..., [0, 2]].all()
    assert not lora_A.grad[:, 1].any() and not lora_B.grad[1].any()


def test_an_active_weight_that_is_not_finite_is_not_lost():
    w = torch.tensor([[[float("nan"), 0.0]], [[0.0, 1.0]]])
    y = lora_experts(torch.randn(2, 3), w, torch.randn(1, 2, 2, 3), [torch.randn(2, 2, 4)], SCALING, GROUPED)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_rows_may_lie_apart():
    """As rows from other ranks do, beside their weights."""
    active, (x, w, lora_A, *lora_B) = inputs_of(7, 5, 4, 2, [6, 3])
    cotangent = torch.randn(7, 9, dtype=torch.float64)
    y = call(lora_experts, active, x, w, lora_A, *lora_B)
    expected = torch.autograd.grad(y, (x, w, lora_A, *lora_B), cotangent)
    with torch.no_grad():
        apart, grad_rows = torch.full((7, 13), 9.0, dtype=x.dtype), torch.full((7, 6), 9.0, dtype=x.dtype)
        apart[:, :5], apart[:, 5:] = x, torch.zeros(7, 8, dtype=x.dtype).masked_scatter(active.flatten(1), w)
        found, kept = GROUPED.forward(apart[:, :5], apart[:, 5:].unflatten(1, (2, 4)), lora_A, lora_B, SCALING)
        weights = (lora_A, lora_B, SCALING)
        grad_w, grad_h = GROUPED.input_gradients(cotangent, kept, *weights, grad_rows[:, :5])
        grad_A, grad_B = GROUPED.weight_gradients(cotangent, apart[:, :5], kept, grad_h, *weights)
    assert (grad_rows[:, 5] == 9).all()
    grads = (grad_rows[:, :5], grad_w[active], grad_A, *grad_B)
    for value, wanted in zip((found, *grads), (y, *expected), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("frozen", [None, "x", "experts"])
def test_update_of_a_frozen_output(in_place, dtype, frozen):
    """In the experts' dtype and, as beside a base of another precision, in another one."""
    active, (x, w, lora_A, lora_B) = inputs_of(6, 5, 4, 2, [3])
    w = torch.zeros(6, 1, 4, dtype=torch.float64).masked_scatter(active, w).detach()
    y = torch.randn(2, 3, 3, dtype=dtype)
    leaves = [t.detach().clone().requires_grad_() for t in (y, x, w, lora_A, lora_B)]
    for t in {None: [], "x": leaves[1:2], "experts": leaves[3:]}[frozen]:
        t.requires_grad_(False)

    def run(add):
        base = leaves[0] * 1
        update = GroupedUpdate(*leaves[1:], SCALING)
        result = update.add_to_reference(base) if add is None else update.add_to(base, add)
        return result, torch.autograd.grad(result, [t for t in leaves if t.requires_grad], torch.ones_like(result))

    (found, grads), (expected, wanted) = run(in_place), run(None)
    torch.testing.assert_close(found, expected)
    names = [n for n, t in zip("yxwAB", leaves, strict=True) if t.requires_grad]
    for name, grad, value in zip(names, grads, wanted, strict=True):
        torch.testing.assert_close(grad * active if name == "w" else grad, value * active if name == "w" else value)


def test_nothing_of_the_size_of_all_pairs_rows_is_kept():
    active, inputs = inputs_of(50, 40, 8, 2, [30], lambda n, g, e: torch.rand(n, g, e) < 0.5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        call(lora_experts, active, *inputs, products=GROUPED)
    assert max(kept) == 50 * 40 and sum(n == 50 * 40 for n in kept) == 1
