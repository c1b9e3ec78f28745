"""When an input group runs as one node, and that its members then give what they give one by one."""

import pytest
import torch

from ldmole_ds.distributed import LocalTokenDispatcher
from ldmole_ds.layers import ForwardContext, build_router, input_group
from ldmole_ds.layers.whole_group import runs_whole
from ldmole_ds.ops import cpu_kernels
from tests.layers.small_group import D, make_group, one_pass, projections

if reason := cpu_kernels.why_not():
    pytest.skip(reason, allow_module_level=True)


def local_group(**changes):
    group = make_group(dispatcher=LocalTokenDispatcher(), **changes)
    group.layers_alive = projections(group)
    return group


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.5}, {"mask_padding": False}], ids=str)
def test_members_in_one_node_are_the_members(changes, monkeypatch):
    torch.manual_seed(0)
    group, x = local_group(**changes), torch.randn(3, 5, D)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, :2] = False
    assert runs_whole(group, x)
    whole = one_pass(group, x, mask)
    with monkeypatch.context() as apart:
        apart.setattr(input_group, "runs_whole", lambda group, x: False)
        parts = one_pass(group, x, mask)
    torch.testing.assert_close(whole[0], parts[0])
    assert whole[1].keys() == parts[1].keys() and len(parts[1]) == 1 + len(list(group.parameters()))
    torch.testing.assert_close(whole[1], parts[1], rtol=2e-5, atol=2e-5)
    for field in ("logits_TGE", "probs_TGE", "lam_T", "live_units_H", "sums", "mask_T"):
        torch.testing.assert_close(getattr(whole[2], field), getattr(parts[2], field), msg=field)


def test_who_runs_whole(monkeypatch):
    x = torch.randn(1, 2, D)
    assert runs_whole(local_group(), x)
    assert not runs_whole(make_group(), x), "tokens go through another dispatcher"
    watched = local_group()
    watched.dispatcher.run = lambda *args: None
    assert not runs_whole(watched, x)
    mlp = {"lambda_mlp": None, "owns_lambda_mlp": False}
    assert not runs_whole(local_group(router=build_router("softmax"), **mlp), x)
    assert not runs_whole(local_group(dtype=torch.bfloat16), x)
    assert not runs_whole(local_group(), x.bfloat16())
    for name in ("gate", "lambda_mlp.weight_in", "lambda_mlp.bias_in", "lambda_mlp.weight_out", "lambda_mlp.bias_out"):
        mixed = local_group()
        mixed.get_parameter(name).data = mixed.get_parameter(name).double()
        assert not runs_whole(mixed, x), f"{name} is read as float32"
    hooked = local_group()
    hooked.layers[1].base_layer.register_forward_hook(lambda *args: None)
    assert not runs_whole(hooked, x), "the hook waits for the layer's call"
    trained = local_group()
    trained.layers[0].base_layer.weight.requires_grad_()
    assert not runs_whole(trained, x), "the frozen layer is not frozen"
    monkeypatch.setenv("LDMOLE_EXPERT_COMPUTE", "grouped")
    assert not runs_whole(local_group(), x)
    monkeypatch.delenv("LDMOLE_EXPERT_COMPUTE")
    monkeypatch.setenv("LDMOLE_FUSED_ROUTING", "off")
    assert not runs_whole(local_group(), x)


def test_a_member_that_is_not_called_and_one_called_alone():
    group, x = local_group(), torch.randn(4, D)
    with group.holder.use(ForwardContext()):
        first = group.layers[0](x)
        group.clear()
        alone = group.layers[2](x)
        group.clear()
        whole = [layer(x) for layer in group.layers]
    torch.testing.assert_close([first, alone], [whole[0], whole[2]])


def test_there_is_no_second_derivative():
    group, x = local_group(), torch.randn(4, D, requires_grad=True)
    with group.holder.use(ForwardContext()):
        (grad,) = torch.autograd.grad(group.layers[0](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
