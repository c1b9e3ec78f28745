"""A whole layer with grouped products against the same layer with dense ones: outputs and every gradient.

Grouped products leave out the gradient of inactive routing weights; no router may miss it.
"""

import pytest
import torch

from ldmole_ds.layers import ForwardContext, LambdaMLP, build_router
from ldmole_ds.ops import grouped_experts, grouped_update
from ldmole_ds.ops.expert_compute import SWITCH
from tests.layers.small_group import D, make_group, projections

E = 16
ROUTERS = ["sparsegen", "sparsegen_fixed", "softmax", "topk", "relu", "lora"]


@pytest.fixture
def grouped_calls(monkeypatch):
    """How often grouped products ran forward."""
    calls, original = [], grouped_experts.add_experts

    def counted(*args):
        calls.append(args)
        return original(*args)

    for module in (grouped_experts, grouped_update):
        monkeypatch.setattr(module, "add_experts", counted)
    return calls


def run(router, in_parts, masked=True):
    """Outputs, gradients by name, and the routing weights of three projections."""
    mlp = {} if router != "sparsegen" else {"lambda_mlp": LambdaMLP(D, 4, generator=torch.Generator().manual_seed(1))}
    kinds = {"router": build_router(router, fixed_lambda=0.3), "num_experts": E, "dtype": torch.float64}
    torch.manual_seed(5)
    group = make_group(**kinds, **(mlp or {"lambda_mlp": None, "owns_lambda_mlp": False})).double()
    layers = [layer.double() for layer in projections(group)]
    x = torch.randn(2, 40, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 40) < 0.9 if masked else None
    with group.holder.use(ForwardContext(padding_mask=mask)):
        outputs = [layer(x) for layer in layers] if in_parts else group(x)
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
    loss.backward()
    grads = {name: p.grad for name, p in group.named_parameters()}
    return list(outputs), {**grads, "x": x.grad}, group.dispatcher.calls[0][1]


@pytest.mark.parametrize("in_parts", [True, False], ids=["added in place", "as a sum"])
@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_and_all_gradients_equal_the_dense_layer(router, in_parts, monkeypatch, grouped_calls):
    monkeypatch.setenv(SWITCH, "dense")
    outputs, grads, probs = run(router, in_parts)
    assert not grouped_calls
    monkeypatch.setenv(SWITCH, "grouped")
    found, found_grads, _ = run(router, in_parts)
    assert len(grouped_calls) == (3 if in_parts else 1)
    assert (probs == 0).any() and (probs != 0).any()
    for y, expected in zip(found, outputs, strict=True):
        torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, atol=1e-11, rtol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    if router != "lora":
        assert grads["gate"].abs().max() > 1e-3
    if router == "sparsegen":
        assert grads["lambda_mlp.bias_out"].abs() > 1e-3


@pytest.mark.parametrize(("size", "expected"), [((4, 2), 0), ((64, 64), 3)], ids=["small", "large"])
def test_the_layer_chooses_by_size(size, expected, monkeypatch, grouped_calls):
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    group = make_group(num_experts=size[0], r=size[1], router=build_router("topk", topk=1))
    x = torch.randn(1, 8192, D)
    for layer in projections(group):
        layer(x)
    assert len(grouped_calls) == expected
