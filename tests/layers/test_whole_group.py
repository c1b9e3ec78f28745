"""When an input group runs as one node, and that its members then give what they give one by one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmole_ds.distributed import LocalTokenDispatcher
from ldmole_ds.layers import ForwardContext, build_router, input_group
from ldmole_ds.layers.whole_group import runs_whole
from ldmole_ds.ops import cpu_kernels, group_cpu, group_triton
from tests.layers.small_group import D, make_group, one_pass, projections
from tests.layers.test_no_host_sync import CUDA, NoNumberFromTheHost, no_synchronization

if reason := cpu_kernels.why_not():
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter


def local_group(**changes):
    group = make_group(dispatcher=LocalTokenDispatcher(), **changes)
    group.layers_alive = [layer.to(group.lora_A) for layer in projections(group)]
    return group.to(group.lora_A)  # the lambda MLP, too


@pytest.fixture
def kernel(request, monkeypatch):
    """Of ``request.param`` "c" or "triton", which without a GPU runs in its interpreter: the device to run on."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="the kernels need triton: pip install triton")
        monkeypatch.setenv("LDMOLE_FUSED_ROUTING", "on")
    called, module = [], {"triton": group_triton, "c": group_cpu}[request.param]
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: called.append(0) or forward(*args))
    yield DEVICE if request.param == "triton" else "cpu"
    assert called, "another kernel ran"


CASES = [{}, {"dropout": 0.5}, {"mask_padding": False}]


@pytest.mark.parametrize(
    ("kernel", "dtype", "changes"),
    [
        *(("c", torch.float32, changes) for changes in CASES),
        *(("triton", torch.float32, changes) for changes in CASES),
        *(("triton", torch.bfloat16, changes) for changes in CASES),
    ],
    ids=str,
    indirect=["kernel"],
)
def test_members_in_one_node_are_the_members(kernel, dtype, changes, monkeypatch):
    torch.manual_seed(0)
    group, x = local_group(dtype=dtype, device=kernel, **changes), torch.randn(3, 5, D).to(kernel, dtype)
    mask = torch.ones(3, 5, dtype=torch.bool, device=kernel)
    mask[0, :2] = False
    assert runs_whole(group, x)
    whole = one_pass(group, x, mask)
    with monkeypatch.context() as apart:
        apart.setattr(input_group, "runs_whole", lambda group, x: False)
        parts = one_pass(group, x, mask)
    assert whole[1].keys() == parts[1].keys() and len(parts[1]) == 1 + len(list(group.parameters()))
    found, expected = ([*one[0], *one[1].values()] for one in (whole, parts))
    if dtype == torch.float32:
        torch.testing.assert_close(whole[0], parts[0])
        torch.testing.assert_close(whole[1], parts[1], rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(found, expected, strict=True):  # parts round h and p before they multiply
        assert ours.dtype == dtype and (ours - theirs).norm() <= 0.02 * theirs.norm()
    for field in ("logits_TGE", "probs_TGE", "lam_T", "live_units_H", "sums", "mask_T"):
        torch.testing.assert_close(getattr(whole[2], field), getattr(parts[2], field), msg=field)


class NoValueForTheHost(TorchDispatchMode):
    """Raises where the host reads a value, or a shape depends on one: a GPU would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        if function.overloadpacket in reads:
            raise RuntimeError(f"{function} reads a value")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
def test_nothing_is_read_by_the_host(kernel):
    group, x = local_group(dtype=torch.bfloat16, device=kernel, dropout=0.5), torch.randn(3, 5, D).to(kernel).bfloat16()
    mask = torch.ones(3, 5, dtype=torch.bool, device=kernel)
    assert runs_whole(group, x.requires_grad_())

    def step():
        context = ForwardContext(padding_mask=mask)
        with group.holder.use(context):
            outputs = [layer(x) for layer in group.layers]
        (record,) = context.records
        sum(y.square().sum() for y in outputs).add(record.sums.square().sum()).backward()

    step()  # the first launch compiles, which may wait
    with NoValueForTheHost(), no_synchronization() if CUDA else NoNumberFromTheHost():
        step()
    with NoValueForTheHost(), pytest.raises(RuntimeError, match="reads a value"):
        x[0, 0, 0].item()


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
    assert not runs_whole(local_group(dtype=torch.bfloat16), x.bfloat16()), "C's kernel takes float32"
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


@pytest.mark.parametrize("kernel", ["triton"], indirect=True)
def test_which_dtypes_a_gpu_runs_whole(kernel):
    x = torch.randn(1, 2, D, device=kernel)
    one_pass(local_group(device=kernel), x)
    for dtype, whole in ((torch.float32, True), (torch.bfloat16, True), (torch.float16, False), (torch.float64, False)):
        group = local_group(dtype=dtype, device=kernel)
        assert runs_whole(group, x.to(dtype)) == whole, "float16 has too small a range for gradients"
    assert not runs_whole(local_group(device=kernel), x.bfloat16()), "adapters in float32 beside half precision"


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
