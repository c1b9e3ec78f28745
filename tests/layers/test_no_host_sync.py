"""An adapted layer never waits for the device, but for the sizes of an exchange.

On a GPU torch itself raises where the host waits (`torch.cuda.set_sync_debug_mode`). Without one the layer runs on the
meta device, whose tensors have no values: what reads a value (item, tolist, nonzero, a mask as an index, ``if tensor``)
cannot run there. What moves numbers from the host, as ``torch.tensor(1.0, device=...)`` does, is found by its name.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmole_ds.distributed import AllToAllTokenDispatcher, ExpertParallel, WeightGatherDispatcher
from ldmole_ds.distributed import dispatch as dispatch_module
from ldmole_ds.distributed.expert_gather import is_outdated
from ldmole_ds.layers import ForwardContext, LambdaMLP, build_router, input_group
from ldmole_ds.model import aux_losses
from ldmole_ds.model.aux_losses import Normalizer, auxiliary_losses
from ldmole_ds.model.routing_batch import RoutingBatch
from ldmole_ds.model.routing_stats import RoutingStatistics
from ldmole_ds.ops import fused_routing
from tests.layers.small_group import D, E, make_group, projections

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "meta"
ROUTERS = ["sparsegen", "sparsegen_fixed", "softmax", "topk", "relu", "lora"]


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    if not CUDA:  # the meta device has none
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


class NoNumberFromTheHost(TorchFunctionMode):
    """Raises where a tensor is made from Python numbers: a GPU waits for such a copy."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        makes = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
        if function in makes and not isinstance(args[-1], torch.Tensor):
            raise RuntimeError(f"{function.__name__} takes numbers from the host")
        return function(*args, **(kwargs or {}))


class NoTensorFromTheHost(TorchDispatchMode):
    """Raises where a tensor of the CPU meets the layer's: a GPU waits for that copy, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if function is not torch.ops.aten.detach.default and any(t.device.type == "cpu" for t in tensors):
            raise RuntimeError(f"{function} takes a tensor from the host")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_synchronization():
    if not CUDA:
        with NoNumberFromTheHost(), NoTensorFromTheHost():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def group_on_device(**changes):
    lambda_mlp = LambdaMLP(D, 4).to(DEVICE)
    return make_group(**{"dropout": 0.1, "device": DEVICE, "lambda_mlp": lambda_mlp, "awake": CUDA, **changes})


def run(group, masked=True):
    """Forward with statistics and auxiliary losses, and backward, of all the group's layers; returns the records."""
    layers = [layer.to(DEVICE) for layer in projections(group)]
    x = torch.randn(2, 7, D, device=DEVICE).requires_grad_()
    mask = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    context = ForwardContext(padding_mask=mask if masked else None)
    normalizer = Normalizer(num_routed_tokens=30.0)
    statistics = RoutingStatistics({group.name: group.members})
    with no_synchronization():
        with group.holder.use(context):
            outputs = [layer(x) for layer in layers]
        batches = RoutingBatch.collect(context.records)
        statistics.add(batches, context.records)
        kinds = {"target_num_experts": 2, "mask_padding": True, "device": torch.device(DEVICE)}
        losses = auxiliary_losses(batches, normalizer, **kinds)
        sum([*losses.values(), *(y.square().sum() for y in outputs)]).backward()
    assert x.grad is not None and group.lora_A.grad is not None
    return context.records


@pytest.fixture(autouse=True)
def checks(monkeypatch):
    """The one read of a model's forward pass, which is not a layer's, is counted instead of done."""
    found = []
    monkeypatch.setattr(aux_losses, "raise_where_broken", lambda broken, layers: found.append(layers))
    return found


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_process(router, masked, checks):
    mlp = {} if router == "sparsegen" else {"lambda_mlp": None, "owns_lambda_mlp": False}
    records = run(group_on_device(router=build_router(router, fixed_lambda=0.3), **mlp), masked)
    assert len(records) == len(checks) == (router != "lora")


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["off", "on"])
def test_with_and_without_the_kernel(monkeypatch, switch):
    monkeypatch.setenv(fused_routing.SWITCH, switch)
    if switch == "on":
        pytest.importorskip("triton")
        run(group_on_device())  # the first launch compiles, which may wait
    records = run(group_on_device())
    assert (records[0].sums is not None) == (switch == "on")


@pytest.mark.skipif(CUDA, reason="the test above runs the kernel")
def test_around_the_kernel(monkeypatch):
    """The kernel itself has no way to wait; what prepares its launch runs here, the launch does not."""
    kernels = pytest.importorskip("ldmole_ds.ops.routing_kernel", reason="the routing kernel needs triton")
    launches = []

    class Launched:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(grid)

    for name in ("routing_forward_kernel", "routing_backward_kernel"):
        monkeypatch.setattr(kernels, name, Launched())
    monkeypatch.setattr(input_group, "uses_fused_routing", lambda logits: True)
    monkeypatch.setenv(fused_routing.SWITCH, "on")
    for masked in (True, False):
        (record,) = run(group_on_device(), masked)
        assert record.sums.shape == (1, 3, 2 * E + 3)
    assert launches == [(1,)] * 4


PAIR = ExpertParallel(ep_size=2, ep_rank=0, ep_group=object(), edp_group=object(), world_size=2, rank=0)


@pytest.fixture
def two_ranks(monkeypatch):
    """A group of two ranks of which the other one sends back what it gets; the number of reads on the host."""
    reads = []

    class Finished:
        def wait(self):
            return None

    def all_to_all(out, data, *splits, group=None, async_op=False):
        return Finished()

    def read_on_host(numbers):
        reads.append(numbers)
        return [[[0, 3], [0, 0]], [[0, 2], [0, 0]]]

    for name, value in {
        "all_to_all_single": all_to_all,
        "all_gather_into_tensor": lambda out, data, group: None,
        "reduce_scatter_tensor": lambda out, data, group: out.zero_(),
        "get_world_size": lambda group=None: 2,
        "get_rank": lambda group=None: 0,
    }.items():
        monkeypatch.setattr(torch.distributed, name, value)
    monkeypatch.setattr(dispatch_module, "read_on_host", read_on_host)
    return reads


def test_tokens_mode_reads_its_sizes_once(two_ranks):
    run(group_on_device(topology=PAIR, dispatcher=AllToAllTokenDispatcher(PAIR)))
    assert len(two_ranks) == 1 and two_ranks[0].shape == (2, 2, 2)


def test_weights_mode_reads_nothing(two_ranks):
    run(group_on_device(topology=PAIR, dispatcher=WeightGatherDispatcher(PAIR)))
    assert two_ranks == []


def test_whether_kept_weights_are_outdated():
    """On a GPU found without a read; on a CPU with one for each tensor, which is quicker there."""
    weights = [torch.randn(2, 3), torch.randn(4)]
    kept = torch.cat([w.flatten() for w in weights]).repeat(2, 1)
    assert not is_outdated(kept, weights, 1)
    weights[1][2] += 1e-6
    assert is_outdated(kept, weights, 1)
    with no_synchronization():
        found = is_outdated(torch.empty(2, 10, device=DEVICE), [torch.empty(2, 5, device=DEVICE)], 1)
    assert found.shape == () and found.dtype == torch.bool


def reads_a_value(logits):
    return logits.softmax(1) * logits.sum().item()


def decides_by_a_value(logits):
    return logits.softmax(1) if logits.sum() > 0 else logits.relu()


def indexes_by_a_mask(logits):
    weights = logits.softmax(1)
    weights[weights > 0.5] = 0.5
    return weights + weights[weights > 2].sum()


def looks_for_nonzero(logits):
    return logits.softmax(1) + logits.nonzero().sum()


def reads_a_list(logits):
    return logits.softmax(1) + logits.flatten()[:1].tolist()[0]


def goes_to_the_host(logits):
    return logits.softmax(1) + logits.sum().cpu().to(logits.device)


def brings_a_number(logits):
    return logits.softmax(1) * torch.tensor(0.5, device=logits.device)


CULPRITS = (
    reads_a_value,
    decides_by_a_value,
    indexes_by_a_mask,
    looks_for_nonzero,
    reads_a_list,
    goes_to_the_host,
    brings_a_number,
)


@pytest.mark.parametrize("culprit", CULPRITS)
def test_every_kind_of_waiting_is_noticed(culprit):
    router = build_router("softmax")
    object.__setattr__(router, "weights", lambda logits, lam: culprit(logits))
    group = group_on_device(router=router, lambda_mlp=None, owns_lambda_mlp=False)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta|host|synchroniz"):
        run(group)
    assert E == group.num_experts
