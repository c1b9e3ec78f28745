"""The C kernels in several threads: the same values for each token, sums that differ in their rounding only."""

import pytest
import torch

from ldmole_ds.ops import cpu_kernels
from ldmole_ds.ops.fused_routing import fused_routing
from ldmole_ds.ops.group_product import GroupWeights, group_product
from ldmole_ds.ops.routing_spec import RoutingSpec

if reason := cpu_kernels.why_not():
    pytest.skip(reason, allow_module_level=True)

D, E, R, H, G = 6, 5, 3, 4, 2


@pytest.fixture
def threads():
    kept = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(kept)


def inputs(t):
    generator = torch.Generator().manual_seed(t)
    random = [torch.randn(shape, generator=generator) for shape in [(t, D), (G, E, R, D), (G, E, D), (H, D), (H,)]]
    random += [torch.randn(shape, generator=generator) for shape in [(1, H), (1,), (E, R, 4), (E, R, 7)]]
    return [x.requires_grad_() for x in random], torch.rand(t, generator=generator) > 0.3


def group(t):
    """By token, and summed over tokens."""
    (x, lora_A, gate, *mlp, B_0, B_1), mask = inputs(t)
    frozen = [torch.ones(4, D), torch.ones(7, D)]
    weights = GroupWeights(frozen, [None, None], lora_A, [B_0, B_1], gate, tuple(mlp), 1.5)
    found = group_product(x, mask, weights, RoutingSpec(torch.float32, 2))
    total = sum(y.square().sum() for y in found.outputs) + found.sums.square().sum() / max(t, 1)
    grad_x, *grads = torch.autograd.grad(total, [x, lora_A, gate, *mlp, B_0, B_1])
    by_token = [*found.outputs, found.probs_GET, found.lam_T]
    return by_token, [grad_x, found.sums, found.live_units_H.float(), *grads]


def routing(t):
    (x, *_), mask = inputs(t)
    # Drawn, not computed: a product may round otherwise in other threads.
    logits = torch.randn(G, E, t, generator=torch.Generator().manual_seed(t + 1)).requires_grad_()
    lambda_logit = x.detach().sum(1).requires_grad_()
    found = fused_routing(logits, lambda_logit, mask, RoutingSpec(torch.float32, 2, True, 5, 1))
    grads = torch.autograd.grad(found.probs_GET.square().sum() + found.sums.sum(), (logits, lambda_logit))
    return [found.probs_GET, found.lam_T, found.destinations, *grads], [found.sums]


@pytest.mark.parametrize("t", [0, 5, 513, 1024, 1701])
@pytest.mark.parametrize("run", [group, routing])
def test_threads_change_nothing(run, t, threads):
    threads(1)
    by_token, summed = run(t)
    for count in (2, 3):
        threads(count)
        found, found_sums = run(t)
        # The products round otherwise, too, and routing weights with them.
        close = {"rtol": 0, "atol": 0} if run is routing else {"rtol": 1e-5, "atol": 1e-5}
        for value, expected in zip(found, by_token, strict=True):
            torch.testing.assert_close(value, expected, **close)
        for value, expected in zip(found_sums, summed, strict=True):
            scale = expected.abs().max().item() if expected.numel() else 1.0
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * scale)
        again, again_sums = run(t)
        assert all(torch.equal(a, b) for a, b in zip(again + again_sums, found + found_sums, strict=True))
