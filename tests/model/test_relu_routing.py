"""ReLU routing (ReMoLE): its balanced L1 loss, the control of that loss's weight, and tokens without any expert."""

import pytest
import torch

from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.adaptive_l1 import AdaptiveL1, balanced_l1_sum
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

CONFIG = {"router": "relu", "target_num_experts": 2, "l1_initial_weight": 1e-3, "l1_growth": 2.0}


def relu_model(**changes):
    return tiny_model(tiny_config(**{**CONFIG, **changes})).train()


def test_l1_by_its_definition():
    torch.manual_seed(0)
    probs = torch.randn(7, 3, 4).relu()
    active, k = (probs > 0).sum(0).float(), 2
    expected = [
        sum(4 / (k * 7) * active[j, e] * probs[t, j, e] for t in range(7) for e in range(4)).item() for j in range(3)
    ]
    assert balanced_l1_sum(probs.sum(0), active, torch.tensor(7.0), k).tolist() == pytest.approx(expected, rel=1e-5)


def test_l1_is_the_plain_norm_where_k_experts_are_used_evenly():
    probs = torch.tensor([[[0.3, 0.2, 0.0, 0.0]], [[0.0, 0.0, 0.7, 0.1]]])
    active = (probs > 0).sum(0).float()
    assert balanced_l1_sum(probs.sum(0), active, torch.tensor(2.0), 2).item() == pytest.approx(probs.sum().item())


def test_weight_rises_and_falls_with_the_experts_in_use():
    control = AdaptiveL1(1e-3, 2.0, 2, "cpu")
    weights = []
    for active in (30, 30, 20, 10):
        control.observe(torch.tensor(active), torch.tensor(20), 1)
        weights.append(control._current().item())
    assert weights == pytest.approx([2e-3, 4e-3, 4e-3, 2e-3])


def test_weight_stands_still_within_an_optimizer_step():
    control = AdaptiveL1(1e-3, 2.0, 2, "cpu")
    seen = []
    for active in (30, 30, 5, 6):
        control.observe(torch.tensor(active), torch.tensor(20), 2)
        seen.append(control.weight.item())
    # Two micro-steps with 60 of 40 raise the weight of the next step, once; 11 of 40 lower it after that.
    assert seen == pytest.approx([1e-3, 1e-3, 2e-3, 2e-3])
    assert control.exponent == 0


def test_loss_holds_the_l1_loss_at_the_weight_of_this_step():
    model, batch = relu_model(router_z_loss_weight=0.0), ragged_batch()
    out = model(**batch)
    plain = model.eval()(**batch).loss
    expected = plain + 1e-3 * out.aux_losses["sparsity"]
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.adaptive_l1.exponent == 1, "more than two of eight experts are in use at the start"
    assert model.adaptive_l1.weight.item() == pytest.approx(1e-3)


def test_evaluation_leaves_the_weight_alone():
    model = relu_model()
    model.eval()(**ragged_batch())
    assert model.adaptive_l1.exponent == 0


def test_control_brings_the_experts_per_token_to_the_target():
    model = relu_model(l1_initial_weight=1e-4, l1_growth=1.2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    used = []
    for step in range(120):
        model.reset_routing_summary()
        model(**ragged_batch(seed=step % 4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        used.append(model.routing.means()["experts_per_token"])
    assert used[0] > 3.5
    assert sum(used[-20:]) / 20 == pytest.approx(2.0, abs=0.5)


@torch.no_grad()
def test_a_token_without_experts_is_the_base_models():
    model = relu_model()
    for group in model.input_groups:
        group.gate.zero_()
    batch = ragged_batch()
    assert torch.equal(model.eval()(**batch).logits, tiny_llama().eval()(**batch).logits)
    assert model.routing.means()["experts_per_token"] == 0.0


def test_no_experts_anywhere_still_trains():
    model = relu_model()
    with torch.no_grad():
        for group in model.input_groups:
            group.gate.zero_()
    out = model(**ragged_batch())
    out.loss.backward()
    assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.adaptive_l1.exponent == -1


def test_the_control_is_saved_with_the_adapter(tmp_path):
    model = relu_model()
    model.adaptive_l1.exponent += 17
    model.save_pretrained(tmp_path)
    assert LDMoLEModel.from_pretrained(tiny_llama(), tmp_path).adaptive_l1.exponent == 17
