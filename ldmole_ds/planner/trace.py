"""One training step of the real code on fake tensors: its operations, and the memory that lives at once.

Nothing is estimated from names or formulas: the wrapped model itself runs forward and backward with tensors that have
shapes but no data (`torch._subclasses.FakeTensorMode`), and every operation is seen on its way; a kernel in C or Triton
is one. The model does what it does on the device that is planned for (`ldmole_ds.planner.step_kind`). Deep models
are traced with two and three layers and continued from there, since each layer adds the same.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.ops import kernel_watch
from ldmole_ds.planner.cluster import Device
from ldmole_ds.planner.model_shape import build_base
from ldmole_ds.planner.step_kind import StepKind

_aten = torch.ops.aten
_TRACED_LAYERS = (2, 3)
# The counter of operations knows products by the functions that return them.
_IN_PLACE = {_aten.addmm_: _aten.addmm}
# Nothing is moved by these.
_FREE = (_aten.detach.default, _aten.new_empty.default, _aten.empty_like.default)


@dataclass
class Trace:
    """Operations of a step of one rank.

    Attributes:
        ops: How often an operation of ``(half precision, floating point operations, bytes moved)`` ran.
        calls: All operations, views included.
        peak: Most bytes alive at once besides parameters and their gradients.
    """

    ops: Counter = field(default_factory=Counter)
    calls: int = 0
    peak: int = 0

    def seconds(self, device: Device) -> float:
        """Roofline: each operation takes the longer of its computing and its moving."""
        busy = sum(n * op_seconds(device, *op) for op, n in self.ops.items())
        starting = self.calls * device.op_seconds
        return max(busy, starting) if device.asynchronous else busy + starting


@dataclass(frozen=True)
class StepTrace:
    """A model's step: ``first`` as traced, plus ``more_layers`` times what one further layer adds (``second`` has it).

    ``second`` is None where the whole model was traced.
    """

    first: Trace
    second: Trace | None = None
    more_layers: int = 0

    def seconds(self, device: Device) -> float:
        """Computing, without communication and optimizer."""
        return self._continued(lambda trace: trace.seconds(device))

    @property
    def peak(self) -> float:
        """Bytes of activations and temporaries."""
        return self._continued(lambda trace: trace.peak)

    def _continued(self, value: Any) -> float:
        first = value(self.first)
        return first if self.second is None else first + self.more_layers * (value(self.second) - first)


def op_seconds(device: Device, half: bool, flops: float, num_bytes: float) -> float:
    """One operation on this device."""
    return max(flops / (device.half_flops if half else device.float_flops), num_bytes / device.bandwidth)


class Recorder(TorchDispatchMode):
    """Fills a `Trace`; answers questions that depend on data with no, and sizes of fake tensors with 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace, self._live, self._sizes = Trace(), 0, {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._sizes[id(tensor.untyped_storage())] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _aten._local_scalar_dense.default and _has_no_answer(args[0]):
            return 0
        out = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in outputs:
            self._see(tensor.untyped_storage())
        self.trace.calls += 1
        storages = {id(t.untyped_storage()) for t in inputs}
        writes = func._schema.is_mutable or any(id(t.untyped_storage()) not in storages for t in outputs)
        if outputs and writes and func not in _FREE:
            # Products of half precision may give float32.
            half = (inputs or outputs)[0].dtype in (torch.bfloat16, torch.float16)
            self.trace.ops[half, _flops(func, args, kwargs or {}, out), _bytes(*inputs, *outputs)] += 1
        return out

    def see_kernel(self, tensors: list[Tensor]) -> None:
        """One in C or Triton: as long as what it reads and writes takes to move."""
        self.trace.calls += 1
        self.trace.ops[False, 0, _bytes(*tensors)] += 1

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live += storage.nbytes()
            self.trace.peak = max(self.trace.peak, self._live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _has_no_answer(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.dtype == torch.bool


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    packet = func.overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention_flops(args[0], args[1])
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 5 * _attention_flops(args[1], args[2]) // 2
    counter = flop_registry.get(_IN_PLACE.get(packet, packet))
    return counter(*args, **kwargs, out_val=out) if counter else 0


def _attention_flops(query: Tensor, key: Tensor) -> int:
    batch, heads, length, width = query.shape
    return 4 * batch * heads * length * key.shape[2] * width


def trace_model(model: LDMoLEModel, ids: Tensor, accumulation: int = 1) -> Trace:
    """Forward and backward of a micro-step on token ``ids`` ``(rows, length)``, on fake tensors or real ones."""
    # What reduces gradients takes them away; they are not part of the activations.
    handles = [p.register_post_accumulate_grad_hook(_forget) for p in model.parameters() if p.requires_grad]
    recorder = Recorder(model.train())
    with recorder, kernel_watch.watched(recorder.see_kernel):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
        model(**batch, gradient_accumulation_steps=accumulation).loss.backward()
    for handle in handles:
        handle.remove()
    return recorder.trace


def _forget(param: nn.Parameter) -> None:
    param.grad = None


def trace_step(
    hf_config: PreTrainedConfig,
    config: LDMoLEConfig,
    kind: StepKind,
    *,
    micro: int,
    length: int,
    dtype: torch.dtype = torch.float32,
) -> StepTrace:
    """The step of a causal language model with this adapter and all experts on one rank; no memory is used.

    Layers are taken to be alike: ``experts_per_layer`` counts with its mean.

    Args:
        hf_config, config: Base model and adapter.
        kind: Of the layout on the device (`kind_of`).
        micro, length: Rows and tokens per row of one micro-step.
        dtype: Of the base model.
    """
    counts = config.experts_per_layer
    if counts:
        config = copy.copy(config)
        config.experts_per_layer, config.num_experts = None, max(1, round(sum(counts) / len(counts)))
    config = copy.copy(config)
    config.projection_groups = None

    def trace(num_layers: int) -> Trace:
        shallow = _with_layers(hf_config, num_layers)
        with kind.fake_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = kind.prepare(get_ldmole_model(build_base(shallow, dtype), config))
            return trace_model(model, torch.zeros(micro, length, dtype=torch.long))

    depth = hf_config.num_hidden_layers
    if depth <= max(_TRACED_LAYERS):
        return StepTrace(trace(depth))
    low, high = _TRACED_LAYERS
    return StepTrace(trace(low), trace(high), depth - low)


def _with_layers(hf_config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    shallow = copy.deepcopy(hf_config)
    kinds = getattr(shallow, "layer_types", None)
    if kinds:
        shallow.layer_types = kinds[:num_layers]
    shallow.num_hidden_layers = num_layers
    return shallow
