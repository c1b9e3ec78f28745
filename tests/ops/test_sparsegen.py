"""Sparsegen against its definition: values, gradients, and the corners of its domain.

E experts; 16 and fewer take the pairwise path, more the sorted one.
"""

import importlib

import pytest
import torch

from ldmole_ds.ops import sparsegen, sparsegen_reference

NUM_EXPERTS = (1, 2, 8, 17, 256)
LAMBDAS = (-1e4, -30.0, -1.0, 0.0, 0.5, 0.99)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["pairwise", "sorted"])
def path(request, monkeypatch):
    """Both ways to find the support, whatever E is."""
    module = importlib.import_module("ldmole_ds.ops.sparsegen")
    monkeypatch.setattr(module, "PAIRWISE_MAX_EXPERTS", 10**6 if request.param == "pairwise" else 0)


def by_bisection(logits, lam):
    """tau solves ``sum_i max(u_i - tau, 0) = 1 - lambda``: bisected in float64, without sorting anything."""
    u, lam = logits.double(), torch.as_tensor(lam).double().unsqueeze(-1)
    high = u.amax(-1, keepdim=True)
    low = high - (1 - lam)
    for _ in range(200):
        tau = (low + high) / 2
        too_low = (u - tau).clamp(min=0).sum(-1, keepdim=True) > 1 - lam
        low, high = torch.where(too_low, tau, low), torch.where(too_low, high, tau)
    return (u - tau).clamp(min=0) / (1 - lam)


def random_case(num_experts, dtype=torch.float32):
    """Every lambda of `LAMBDAS` with logits of several spreads; 60 tokens, so that some lie close to the edge."""
    spread = torch.tensor([0.01, 1.0, 1.0, 5.0], dtype=dtype).repeat(15)[:, None, None]
    logits = torch.randn(60, len(LAMBDAS), num_experts, dtype=dtype) * spread
    return logits, torch.tensor(LAMBDAS, dtype=dtype).repeat(60, 1)


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_values_solve_the_defining_equation(path, num_experts):
    logits, lam = random_case(num_experts)
    probs = sparsegen(logits, lam)
    assert (probs.double() - by_bisection(logits, lam)).abs().max() < 1e-6
    assert (probs.sum(-1) - 1).abs().max() < 1e-5
    assert probs.min() >= 0


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_values_and_gradients_equal_the_reference(path, num_experts):
    results = []
    for function in (sparsegen, sparsegen_reference):
        torch.manual_seed(1)
        logits, lam = (t.requires_grad_() for t in random_case(num_experts, torch.float64))
        probs = function(logits, lam)
        cotangent = torch.randn_like(probs)
        results.append((probs, *torch.autograd.grad(probs, (logits, lam), cotangent)))
    for name, ours, expected in zip(("probs", "logits", "lambda"), *results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    active = (results[0][0] > 0).sum(-1).double().mean(0)
    assert active[0] == num_experts, "lambda -1e4 must leave every expert active"
    assert num_experts == 1 or active[-1] < active[0] / 1.5, "lambda 0.99 must leave few"


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_gradcheck(path, num_experts):
    # Evenly spaced logits in random order: no two closer than 1/E, far more than gradcheck's step of 1e-6.
    rows = [torch.randperm(num_experts).double() * 1.1 / num_experts for _ in range(3)]
    logits = torch.stack(rows).requires_grad_()
    lam = torch.tensor([-3.0, 0.03, 0.57], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsegen, (logits, lam))


@pytest.mark.parametrize("num_experts", [2, 8, 17, 64])
def test_the_two_paths_are_equal_with_ties(monkeypatch, num_experts):
    module = importlib.import_module("ldmole_ds.ops.sparsegen")
    # Eighths are exact in float32, and with few values most rows hold ties, also right at the support's edge.
    logits = torch.randint(0, 6, (400, num_experts)) / 8
    lam = torch.randint(-8, 8, (400,)) / 8
    results = []
    for limit in (10**6, 0):
        monkeypatch.setattr(module, "PAIRWISE_MAX_EXPERTS", limit)
        results.append(sparsegen(logits, lam))
    assert torch.equal(results[0] > 0, results[1] > 0)
    torch.testing.assert_close(results[0], results[1], atol=1e-7, rtol=0)
    assert (results[0] - by_bisection(logits, lam)).abs().max() < 1e-6
    tied = logits.unsqueeze(-1) == logits.unsqueeze(-2)
    differ = results[0].unsqueeze(-1) != results[0].unsqueeze(-2)
    assert not (tied & differ).any(), "equal logits must get equal weights"


def test_ties_by_hand(path):
    # All equal: 1/E. Two of three lead by 1, lambda 0.5: they share. At lambda 0 a lead of exactly 1 takes everything.
    assert torch.equal(sparsegen(torch.full((4,), 3.0), torch.tensor(0.9)), torch.full((4,), 0.25))
    assert sparsegen(torch.tensor([1.0, 0.0, 1.0]), torch.tensor(0.5)).tolist() == [0.5, 0.0, 0.5]
    assert sparsegen(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(0.0)).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
@pytest.mark.parametrize(("spread", "offset"), [(1e4, 0.0), (1.0, 1e4), (1.0, -1e4), (100.0, 1e4)])
def test_large_logits_and_a_common_offset_cost_no_precision(path, num_experts, spread, offset):
    for lam in LAMBDAS:
        logits = torch.randn(8, num_experts) * spread + offset
        probs = sparsegen(logits, torch.tensor(lam))
        assert (probs.double() - by_bisection(logits, torch.tensor(lam))).abs().max() < 1e-6
        assert (probs > 0).any(-1).all(), "a token must keep at least one expert"


@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_lambda_zero_is_sparsemax(path, num_experts):
    logits = torch.randn(32, num_experts)
    # The projection onto the simplex, by its optimality condition: (u - p) . (q - p) <= 0 for every corner q.
    probs = sparsegen(logits, torch.tensor(0.0)).double()
    residual = logits - probs
    to_corners = residual - (residual * probs).sum(-1, keepdim=True)
    assert to_corners.max() < 1e-5
    assert (probs.sum(-1) - 1).abs().max() < 1e-6


def test_a_shift_changes_nothing(path):
    logits = torch.randint(-64, 64, (50, 12)) / 32
    # 1024 + 1/32 is exact in float32, so the result must be equal to the last bit.
    lam = torch.linspace(-5, 0.99, 50)
    assert torch.equal(sparsegen(logits + 1024, lam), sparsegen(logits, lam))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(path, dtype):
    logits, lam = torch.randn(200, 8).to(dtype).requires_grad_(), torch.linspace(-2, 0.99, 200).requires_grad_()
    cotangent = torch.randn(200, 8).to(dtype)
    probs = sparsegen(logits, lam)
    exact = sparsegen(logits.float(), lam)
    assert probs.dtype == dtype and torch.equal(probs, exact.to(dtype))
    grads = torch.autograd.grad(probs, (logits, lam), cotangent)
    expected = torch.autograd.grad(exact, (logits, lam), cotangent.float())
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.equal(grad, wanted)


def test_lambda_broadcasts_and_its_gradient_sums():
    logits, lam = torch.randn(5, 3, 8), torch.linspace(-2, 0.9, 5).unsqueeze(1).requires_grad_()
    spread = lam.detach().expand(5, 3).clone().requires_grad_()
    cotangent = torch.randn(5, 3, 8)
    probs, wanted = sparsegen(logits, lam), sparsegen(logits, spread)
    assert torch.equal(probs, wanted)
    (grad,), (each,) = torch.autograd.grad(probs, lam, cotangent), torch.autograd.grad(wanted, spread, cotangent)
    torch.testing.assert_close(grad, each.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_may_be_a_number(dtype):
    logits = torch.randn(5, 8, dtype=dtype)
    assert torch.equal(sparsegen(logits, 0.3), sparsegen(logits, torch.tensor(0.3, dtype=dtype)))
    assert torch.equal(sparsegen(logits, 0), sparsegen(logits, torch.tensor(0.0, dtype=dtype)))


@pytest.mark.parametrize("num_experts", [1, 8, 17])
def test_a_bad_input_never_gives_a_finite_row(path, num_experts):
    bad_logits = torch.zeros(3, num_experts)
    bad_logits[torch.arange(3), torch.tensor([0, num_experts - 1, num_experts // 2])] = torch.tensor([NAN, INF, -INF])
    assert not sparsegen(bad_logits, torch.tensor(0.0)).isfinite().all(-1).any()
    for lam in (NAN, INF, -INF, 1.0, 1.5):
        assert not sparsegen(torch.randn(4, num_experts), torch.tensor(lam)).isfinite().all(-1).any(), lam
    # A bad row leaves its neighbours alone.
    logits = torch.zeros(2, num_experts)
    logits[0, 0] = NAN
    assert torch.equal(sparsegen(logits, torch.tensor(0.0))[1], torch.full((num_experts,), 1 / num_experts))
