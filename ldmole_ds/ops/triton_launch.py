"""How this package's Triton kernels are started."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ldmole_ds.ops import kernel_watch


def launch(name: str, programs: int, *args: Tensor | float, **constants: object) -> None:
    """Start a kernel on the device of its first argument. On fake tensors it has nothing to do.

    Args:
        name: ``module.kernel``, below `ldmole_ds.ops`; Triton is imported here and nowhere before.
        programs: How many.
        args: Tensors and numbers.
        constants: What it is compiled for.
    """
    kernel_watch.tell(args)
    first = args[0]
    if isinstance(first, FakeTensor):
        return
    module, _, kernel = name.rpartition(".")
    with torch.cuda.device_of(first):
        getattr(importlib.import_module(f"ldmole_ds.ops.{module}"), kernel)[(programs,)](*args, **constants)
