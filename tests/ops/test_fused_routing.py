"""The routing kernels against their plain reference: Triton's on a GPU, or without one in its interpreter, and C's.

G projections, E experts, T tokens, P ranks.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmole_ds.ops import cpu_kernels, routing_cpu, routing_triton
from ldmole_ds.ops.fused_routing import SWITCH, backend_of, destinations_of, fused_routing, routing_reference
from ldmole_ds.ops.routing_spec import RoutingSpec, RoutingSums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")
# numpy's, of the interpreter: tokens without a number divide nothing by nothing, and the result is not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, params=["triton", "c"])
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="the routing kernel needs triton: pip install triton")
        monkeypatch.setenv(SWITCH, "on")
        assert backend_of(torch.zeros(1, device=DEVICE)) is routing_triton
        return request.param
    if reason := cpu_kernels.why_not():
        pytest.skip(reason)
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    assert backend_of(torch.zeros(1)) is routing_cpu
    return request.param


def results(function, logits, lambda_logit, mask, spec, dtype):
    """Outputs and gradients in float64; the cotangents are the same for every function and dtype."""
    logits, lambda_logit = (t.to(DEVICE, dtype).clone().requires_grad_() for t in (logits, lambda_logit))
    routing = function(logits, lambda_logit, None if mask is None else mask.to(DEVICE), spec)
    sums = RoutingSums.of(routing.sums)
    outputs = (routing.probs_GET, sums.probs_JE, sums.sparsity_J, sums.router_z_J)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, (logits, lambda_logit), cotangents)
    found = {"probs": routing.probs_GET, "lambda": routing.lam_T, "sparsity": sums.sparsity_J, "z": sums.router_z_J}
    found |= {"prob sums": sums.probs_JE, "grad logits": grads[0], "grad lambda": grads[1]}
    exact = {"active": sums.active_JE, "broken": sums.broken_J, "destinations": routing.destinations}
    return found, exact


def assert_equals_reference(logits, lambda_logit, mask, spec, dtype=torch.float32, rtol=2e-5, atol=2e-6):
    """Against the reference in float64, relative to the largest value of each tensor."""
    ours, exact = results(fused_routing, logits, lambda_logit, mask, spec, dtype)
    # What the kernel reads: rounding the input is not its error.
    rounded = [t.to(dtype).double() for t in (logits, lambda_logit)]
    expected, expected_exact = results(routing_reference, *rounded, mask, spec, torch.float64)
    for name, value in expected.items():
        scale = max(value.double().abs().max().item(), 1.0) if value.numel() else 1.0
        torch.testing.assert_close(
            ours[name].double(), value.double(), atol=atol * scale, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}"
        )
    for name, value in expected_exact.items():
        assert (value is None) == (exact[name] is None)
        assert value is None or torch.equal(exact[name].double(), value.double()), name


def random_case(g, e, t, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(g, e, t, generator=generator)
    return logits, 4 * torch.randn(t, generator=generator), torch.rand(t, generator=generator) > 0.3


CASES = {
    "one expert": (1, 1, 5, RoutingSpec(torch.float32, 2, True, 1, 0)),
    "two": (2, 2, 17, RoutingSpec(torch.float32, 1, True, 2, 1)),
    "paper, two blocks": (3, 8, 70, RoutingSpec(torch.float32, 2, True, 4, 2)),
    "not a power of two, padding routed": (2, 6, 20, RoutingSpec(torch.float32, 2, False, 3, 0)),
    "many, no plan": (1, 40, 7, RoutingSpec(torch.float32, 3)),
    "256": (1, 256, 3, RoutingSpec(torch.float32, 2, True, 2, 0)),
    "no token": (2, 8, 0, RoutingSpec(torch.float32, 2, True, 2, 0)),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_outputs_counts_plan_and_gradients_equal_the_reference(case, masked):
    g, e, t, spec = CASES[case]
    logits, lambda_logit, mask = random_case(g, e, t)
    assert_equals_reference(logits, lambda_logit, mask if masked else None, spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(dtype, backend):
    logits, lambda_logit, mask = random_case(2, 5, 18)
    spec = RoutingSpec(dtype, 2, True, 1, 0)
    eps = torch.finfo(dtype).eps
    assert_equals_reference(logits, lambda_logit, mask, spec, dtype, rtol=2 * eps, atol=eps)
    # float32 in, half precision out, as the layers use it: rounded once, and its sums not at all.
    one = fused_routing(logits.to(DEVICE), lambda_logit.to(DEVICE), None, spec)
    exact = fused_routing(logits.to(DEVICE), lambda_logit.to(DEVICE), None, RoutingSpec(torch.float32, 2))
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    rtol = eps if DEVICE == "cpu" and backend == "triton" else 0
    torch.testing.assert_close(one.probs_GET, exact.probs_GET.to(dtype), rtol=rtol, atol=0)
    assert torch.equal(one.sums, exact.sums)


EDGE_LOGITS = [0.0, 0.125, -0.125, 1.0, -1.0, 3.0, 1e4, -1e4, 1e-8]
EDGE_LAMBDAS = [0.0, 1.0, -1.0, 4.0, 80.0, -0.01, -8.0, -1e4]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), num_experts=st.integers(1, 33), offset=st.sampled_from([0.0, 1024.0, -1024.0]))
def test_edge_values(data, num_experts, offset):
    """Ties, huge spreads, common offsets, lambda from near 1 to far below 0, for any E."""
    t = 3
    numbers = data.draw(st.lists(st.sampled_from(EDGE_LOGITS), min_size=num_experts * t, max_size=num_experts * t))
    lambda_logit = torch.tensor(data.draw(st.lists(st.sampled_from(EDGE_LAMBDAS), min_size=t, max_size=t)))
    logits = torch.tensor(numbers).view(1, num_experts, t) + offset
    spec = RoutingSpec(torch.float32, 2)
    routing = fused_routing(logits.to(DEVICE), lambda_logit.to(DEVICE), None, spec)
    expected = routing_reference(logits.double(), lambda_logit.double(), None, spec)
    probs = routing.probs_GET.cpu().double()
    # 1 - lambda is at least 0.01: float32's rounding of the logits' differences, at most 1e4, counts a hundredfold.
    assert (probs - expected.probs_GET).abs().max() < 2e-6
    assert (probs.sum(1) - 1).abs().max() < 1e-5 and (probs > 0).any(1).all() and probs.min() >= 0
    tied = logits.unsqueeze(1) == logits.unsqueeze(2)
    assert not (tied & (probs.unsqueeze(1) != probs.unsqueeze(2))).any(), "equal logits must get equal weights"


@pytest.mark.parametrize("size", [1e30, 1e37, 3e38])
def test_logits_whose_sums_overflow(size):
    logits = size * torch.tensor([[[1.0, -1, 0.5], [-1, -1, -1], [-1, 1, -1]]], device=DEVICE)
    lambda_logit = torch.zeros(3, requires_grad=True, device=DEVICE)
    routing = fused_routing(logits.requires_grad_(), lambda_logit, None, RoutingSpec(torch.float32, 2))
    assert routing.probs_GET.tolist() == [[[1, 0, 1], [0, 0, 0], [0, 1, 0]]]
    grads = torch.autograd.grad(routing.probs_GET.square().sum(), (logits, lambda_logit))
    assert all(g.isfinite().all() for g in grads)


def test_a_target_beyond_all_experts_is_no_loss():
    logits, lambda_logit, _ = random_case(1, 4, 6)
    few, many = (
        fused_routing(logits.to(DEVICE), lambda_logit.to(DEVICE), None, RoutingSpec(torch.float32, target))
        for target in (4, 10**9)
    )
    assert torch.equal(few.sums, many.sums) and torch.equal(few.probs_GET, many.probs_GET)


def test_a_broken_token_is_flagged_and_leaves_the_others_alone():
    logits, lambda_logit, _ = random_case(2, 3, 12)
    for token, bad in ((1, NAN), (2, INF), (3, -INF)):
        logits[1, token % 3, token] = bad
    for token, bad in ((5, NAN), (6, -INF)):
        lambda_logit[token] = bad
    mask = torch.arange(12) != 3
    spec = RoutingSpec(torch.float32, 2, True, 3, 0)
    x = logits.to(DEVICE).requires_grad_()
    routing = fused_routing(x, lambda_logit.to(DEVICE), mask.to(DEVICE), spec)
    # Padding is reported, as it is without the kernel, but not routed.
    assert RoutingSums.of(routing.sums).broken_J.tolist() == [2, 5]
    assert routing.destinations[-1].nonzero().flatten().tolist() == [1, 2, 3, 5, 6]
    finite = routing.probs_GET.isfinite().all(1).cpu()
    assert [row.nonzero().flatten().tolist() for row in ~finite] == [[5, 6], [1, 2, 5, 6]]
    assert not routing.probs_GET[..., 3].any()
    (grad,) = torch.autograd.grad(routing.probs_GET[1, 0].nan_to_num().sum(), x)
    assert grad.isfinite().all() and not grad[1, :, [1, 2, 3, 5, 6]].any() and grad[1].any()
    clean, clean_lambda = logits.nan_to_num(posinf=0, neginf=0), lambda_logit.nan_to_num(neginf=0)
    whole = fused_routing(clean.to(DEVICE), clean_lambda.to(DEVICE), mask.to(DEVICE), spec)
    good = finite & mask
    for member in range(2):
        rows = good[member]
        assert torch.equal(routing.probs_GET[member].cpu()[:, rows], whole.probs_GET[member].cpu()[:, rows])


def differentiable(function, dtype, mask=None):
    """All but the sparsity sum: its logits count as constants, which differences cannot know."""

    def outputs(logits, lambda_logit):
        routing = function(logits, lambda_logit, mask, RoutingSpec(dtype, 2))
        sums = RoutingSums.of(routing.sums)
        return routing.probs_GET, sums.probs_JE.to(dtype), sums.router_z_J.to(dtype)

    return outputs


@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck():
    # Weights are linear in the logits while the support stays: steps of 1e-2 are exact where no two are that close.
    logits = torch.tensor([[[0.0, 0.1], [0.4, 0.5], [0.9, 0.35]]]).to(DEVICE).requires_grad_()
    lambda_logit = torch.tensor([-2.0, -0.6]).to(DEVICE).requires_grad_()
    tolerance = {"eps": 1e-2, "atol": 5e-4, "rtol": 5e-3}
    assert torch.autograd.gradcheck(differentiable(fused_routing, torch.float32), (logits, lambda_logit), **tolerance)


def test_the_reference_passes_gradcheck_in_float64():
    logits, lambda_logit, mask = random_case(2, 5, 6)
    inputs = [t.double().requires_grad_() for t in (logits, lambda_logit)]
    assert torch.autograd.gradcheck(differentiable(routing_reference, torch.float64, mask), inputs)


def test_only_the_gradients_that_are_asked_for():
    logits, lambda_logit, _ = random_case(1, 4, 6)
    spec = RoutingSpec(torch.float32, 2)
    for pick in (lambda r: r.probs_GET[0, 0], lambda r: r.sums[..., 4:9]):
        grads = []
        for function in (fused_routing, routing_reference):
            inputs = [t.to(DEVICE).requires_grad_() for t in (logits.clone(), lambda_logit.clone())]
            grads.append(torch.autograd.grad(pick(function(*inputs, None, spec)).sum(), inputs))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def test_destinations_by_hand():
    probs = torch.tensor([[[0.5, 0, 0, 0.5]], [[0, 1.0, 0, 0]], [[0, 0, NAN, 0]], [[0, 0, 0, 0]]])
    found = destinations_of(probs, 2, 0)
    assert found.tolist() == [[False] * 4, [True, False, True, False], [False, False, True, False]]


@pytest.mark.gpu
@pytest.mark.parametrize(("e", "t"), [(8, 8191), (64, 1000), (250, 333)])
def test_large_shapes(e, t):
    logits, lambda_logit, mask = random_case(3, e, t)
    results_of = [
        results(function, logits, lambda_logit, mask, RoutingSpec(torch.float32, 2), dtype)[0]
        for function, dtype in ((fused_routing, torch.float32), (routing_reference, torch.float64))
    ]
    for name, value in results_of[1].items():
        difference = (results_of[0][name].double() - value).norm() / value.norm()
        assert difference < 1e-4, name
