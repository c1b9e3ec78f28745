"""The auxiliary losses on cases worked out by hand. T tokens, J projections, E experts, k target number of experts."""

import math

import pytest
import torch

from ldmole_ds.ops import load_balancing_loss, lower_lambda, router_z_loss, sparsegen, sparsity_loss
from ldmole_ds.ops.losses import largest_by_insertion, router_z_sum, sparsity_sum


def test_balanced_routing_costs_one():
    # Every expert has weight 1/4 on every token: f = P = 1/4, so E sum f P = 4 * 4 / 16.
    assert load_balancing_loss(torch.full((6, 2, 4), 0.25)).item() == pytest.approx(1.0)
    # One expert per token, each in turn: again f = P = 1/4.
    assert load_balancing_loss(torch.eye(4).repeat(3, 1).unsqueeze(1)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_one_expert_for_everything_costs_the_number_of_experts(num_experts):
    probs = torch.zeros(5, 1, num_experts)
    probs[..., -1] = 1.0
    assert load_balancing_loss(probs).item() == pytest.approx(num_experts)


def test_load_balancing_by_hand():
    # Two tokens, E = 3. Token 0 uses experts 0 and 1 with 3/4 and 1/4, token 1 uses expert 0 alone.
    # Three activations: f = (2/3, 1/3, 0). P = ((3/4 + 1) / 2, 1/8, 0). Loss = 3 (2/3 * 7/8 + 1/3 * 1/8) = 15/8.
    probs = torch.tensor([[[0.75, 0.25, 0.0]], [[1.0, 0.0, 0.0]]], requires_grad=True)
    loss = load_balancing_loss(probs)
    assert loss.item() == pytest.approx(15 / 8)
    # f carries no gradient, so d loss / d p_te = E f_e / T = 3/2 f_e: also for the idle expert, 0.
    (grad,) = torch.autograd.grad(loss, probs)
    torch.testing.assert_close(grad, torch.tensor([1.0, 0.5, 0.0]).expand(2, 1, 3))


def test_load_balancing_is_a_mean_over_projections_not_over_pooled_tokens():
    # Projection 0 is balanced (1), projection 1 uses one of two experts (2). Pooled it would be 2 (3/4 * 3/4 + 1/16).
    probs = torch.stack([torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])], dim=1)
    assert load_balancing_loss(probs).item() == pytest.approx(1.5)


@pytest.mark.parametrize("num_experts", [3, 8, 20])
def test_lower_lambda_is_the_smallest_that_leaves_at_most_k_experts(num_experts):
    logits = torch.randn(50, num_experts, dtype=torch.float64)
    for k in range(1, num_experts):
        lowest = lower_lambda(logits, k)
        # The bound lies below 1 by the sum of k gaps; keep the rows where lambda + 1e-4 is still below 1.
        usable = 1 - lowest > 2e-4
        assert usable.sum() > 40
        above, below = ((sparsegen(logits, lowest + step) > 0).sum(-1)[usable] for step in (1e-4, -1e-4))
        assert (above <= k).all() and (below > k).all()


@pytest.mark.parametrize("n", [1, 3, 5])
def test_insertion_finds_what_topk_finds(n):
    values = torch.randn(40, 2, 5)
    values[:10] = values[:10].round()  # ties
    torch.testing.assert_close(torch.stack(largest_by_insertion(values, n), -1), values.topk(n).values, rtol=0, atol=0)


def test_lower_lambda_by_hand():
    # u = (3, 2, 0): k = 1 gives 1 - (3 - 2) = 0, k = 2 gives 1 - (5 - 2 * 0) = -4.
    logits = torch.tensor([0.0, 3.0, 2.0], requires_grad=True)
    assert lower_lambda(logits, 1).item() == 0.0 and lower_lambda(logits, 2).item() == -4.0
    assert not lower_lambda(logits, 1).requires_grad


def test_sparsity_loss_by_hand():
    # Two tokens, one projection, k = 1. Lower bounds 0 and -2 for gaps of 1 and 3; lambda -0.5 and 0.5.
    # Penalties 0 - (-0.5) = 0.5, and none: the mean is 0.25, and d loss / d lambda = -1/2 for the first token only.
    logits = torch.tensor([[[3.0, 2.0, 0.0]], [[3.0, 0.0, 0.0]]], requires_grad=True)
    lam = torch.tensor([-0.5, 0.5], requires_grad=True)
    loss = sparsity_loss(logits, lam, 1)
    assert loss.item() == pytest.approx(0.25)
    assert torch.autograd.grad(loss, lam)[0].tolist() == [-0.5, 0.0]


@pytest.mark.parametrize("k", [3, 4, 100])
def test_a_target_of_all_experts_is_no_penalty(k):
    logits, lam = torch.randn(4, 2, 3), torch.full((4,), -50.0, requires_grad=True)
    assert sparsity_loss(logits, lam, 2) > 10
    loss = sparsity_loss(logits, lam, k)
    assert loss.item() == 0.0
    # It still has a graph, so that a loss of this term alone can be differentiated.
    assert torch.autograd.grad(loss, lam)[0].tolist() == [0.0] * 4


def test_lambda_per_token_or_per_projection():
    logits, lam = torch.randn(4, 3, 8), torch.randn(4) - 3
    each = lam.unsqueeze(1).expand(4, 3)
    assert torch.equal(sparsity_sum(logits, lam, 2), sparsity_sum(logits, each, 2))
    assert sparsity_sum(logits, lam, 2).shape == (3,)


def test_router_z_loss_by_hand():
    # logsumexp of n equal logits c is c + log n.
    logits = torch.stack([torch.full((1, 4), 0.0), torch.full((1, 4), 1.0)])
    expected = (math.log(4) ** 2 + (1 + math.log(4)) ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected)


def test_a_mask_equals_leaving_the_tokens_out():
    logits, lam, mask = torch.randn(9, 2, 8), torch.randn(9) - 2, torch.arange(9) % 3 != 1
    probs = sparsegen(logits, lam.clamp(max=0.9).unsqueeze(-1))
    # What stands at masked places must not matter, not even NaN.
    dirty_logits, dirty_lam, dirty_probs = logits.clone(), lam.clone(), probs.clone()
    for dirty in (dirty_logits, dirty_lam, dirty_probs):
        dirty[~mask] = float("nan")
    for loss, kept in (
        (load_balancing_loss(dirty_probs, mask), load_balancing_loss(probs[mask])),
        (sparsity_loss(dirty_logits, dirty_lam, 2, mask), sparsity_loss(logits[mask], lam[mask], 2)),
        (router_z_loss(dirty_logits, mask), router_z_loss(logits[mask])),
    ):
        torch.testing.assert_close(loss, kept)
    assert sparsity_loss(logits, lam, 2) != sparsity_loss(logits, lam, 2, mask)


def test_sums_are_means_times_tokens():
    logits, lam, mask = torch.randn(6, 3, 8), torch.randn(6) - 2, torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    torch.testing.assert_close(router_z_sum(logits).mean() / 6, router_z_loss(logits))
    torch.testing.assert_close(router_z_sum(logits, mask).mean() / 3, router_z_loss(logits, mask))
    torch.testing.assert_close(sparsity_sum(logits, lam, 2, mask).mean() / 3, sparsity_loss(logits, lam, 2, mask))
