"""A whole model with the routing kernel, against the same one in plain operations: training and reports agree."""

import pytest
import torch

from ldmole_ds.model.routing_batch import FusedRoutingBatch, RoutingBatch
from ldmole_ds.ops import fused_routing
from tests.tiny import ragged_batch, tiny_config, tiny_model, wake_experts

pytest.importorskip("triton", reason="the routing kernel needs triton: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LOSSES = {"sparsity_loss_weight": 0.5, "router_z_loss_weight": 0.1}


def train_once(switch, monkeypatch, *, recompute=False, num_experts=6, **changes):
    """Loss, auxiliary losses, gradients and routing report of one step; and what kind of batches the losses saw."""
    monkeypatch.setenv(fused_routing.SWITCH, switch)
    torch.manual_seed(0)
    config = tiny_config(num_experts=num_experts, target_modules=["q_proj", "k_proj", "down_proj"], **LOSSES, **changes)
    model = tiny_model(config).to(DEVICE).train()
    wake_experts(model)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kinds = set()
    collect = RoutingBatch.collect

    def watch(records):
        batches = collect(records)
        kinds.update(type(batch) for batch in batches)
        return batches

    monkeypatch.setattr(RoutingBatch, "collect", watch)
    torch.manual_seed(3)
    out = model(**{k: v[:2, -24:].to(DEVICE) for k, v in ragged_batch().items()})
    out.loss.backward()
    monkeypatch.setattr(RoutingBatch, "collect", collect)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.loss, out.aux_losses, grads, model.routing_summary(), kinds


CASES = {
    "defaults": {},
    "padding is routed": {"mask_padding": False},
    "recomputed, a lambda MLP for each group": {"recompute": True, "lambda_sharing": "per_layer"},
}


@pytest.mark.parametrize("switch", ["on", "auto"])  # Triton's kernel, and C's on a CPU
@pytest.mark.parametrize("case", CASES)
def test_one_step_equals_the_plain_one(monkeypatch, case, switch):
    plain, fused = (train_once(each, monkeypatch, **CASES[case]) for each in ("off", switch))
    assert (plain[-1], fused[-1]) == ({RoutingBatch}, {FusedRoutingBatch})
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=0)
    for name, value in plain[1].items():
        torch.testing.assert_close(fused[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert value > 0.01, f"{name}: a loss of nothing compares nothing"
    assert fused[2].keys() == plain[2].keys()
    for name, grad in plain[2].items():
        assert (fused[2][name] - grad).norm() < 1e-4 * grad.norm(), name
    for projection, expected in plain[3].items():
        assert fused[3][projection].pop("group") == expected.pop("group")
        for name, value in expected.items():
            # lambda is near -1.5 in float32, and its spread much smaller.
            assert fused[3][projection][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (projection, name)


def test_a_broken_layer_is_named(monkeypatch):
    monkeypatch.setenv(fused_routing.SWITCH, "on")
    model = tiny_model(tiny_config(target_modules=["q_proj", "down_proj"])).to(DEVICE).train()
    with torch.no_grad():
        model.input_groups[1].gate[0, 2, 5] = float("inf")
    batch = {k: v[:1].to(DEVICE) for k, v in ragged_batch().items()}
    with pytest.raises(FloatingPointError, match="non-finite routing in model.layers.0.mlp.down_proj"):
        model(**batch)
