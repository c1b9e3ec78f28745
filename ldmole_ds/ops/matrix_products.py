"""Products of float32 matrices on a CPU, by whichever of PyTorch's two libraries is faster there.

PyTorch gives them to MKL, which runs its AVX2 kernels on AMD's processors. Those from Zen 5 on do twice as much with
AVX-512, which oneDNN uses there; PyTorch brings it as well (``benchmarks/products.py`` has the times). The environment
variable ``LDMOLE_CPU_PRODUCTS`` says who multiplies:

    auto      the default: oneDNN on AMD's processors from Zen 5 on, where PyTorch has MKL; else whom PyTorch takes
    torch     always whom PyTorch takes
    onednn    oneDNN on every processor and for products of any size; an error where PyTorch does not have it

oneDNN makes a kernel for each new shape, which takes about a millisecond. So it gets the products of tokens that a rank
reads itself, in as many layers as there are, and not those of tokens that travel, whose number is another in each
exchange; and none so small that they gain nothing.

Each adds up in an order of its own: results differ by rounding.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmole_ds.ops.planned import on_gpu

SWITCH = "LDMOLE_CPU_PRODUCTS"
# T, and T * D.
FEWEST_TOKENS, FEWEST_VALUES = 128, 1 << 16
# oneDNN's product is added in a second step, for so many values at a time, which stay in the caches. Of few factors
# each the library that adds as it multiplies is as fast.
_VALUES_ADDED, _FEWEST_ADDED_FACTORS = 1 << 21, 256
_FIRST_WIDE_AMD_FAMILY = 26  # Zen 5
_CPUINFO = Path("/proc/cpuinfo")


class MatrixProducts(NamedTuple):
    """How matrices are multiplied; no graph.

    Attributes:
        linear: ``(x (T, D), weight (O, D), bias (O,) or None) -> (T, O)``.
        mm: ``(a, b, out=None) -> a @ b``.
        add_mm_: ``(y, a, b)``: ``y += a @ b``, in place; returns y.
    """

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    mm: Callable[..., Tensor]
    add_mm_: Callable[[Tensor, Tensor, Tensor], Tensor]


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _onednn_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    product = _onednn_linear(a, b.t(), None)
    return product if out is None else out.copy_(product)


def _onednn_add_mm_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] < _FEWEST_ADDED_FACTORS:
        return y.addmm_(a, b)
    rows = max(_VALUES_ADDED // y.shape[1], 1)
    for some_y, some_a in zip(y.split(rows), a.split(rows), strict=True):
        some_y.add_(_onednn_mm(some_a, b))
    return y


TORCH = MatrixProducts(F.linear, torch.mm, Tensor.addmm_)
ONEDNN = MatrixProducts(_onednn_linear, _onednn_mm, _onednn_add_mm_)


def products_for(x: Tensor) -> MatrixProducts:
    """Who multiplies with these tokens ``(..., D)``; see the module docstring.

    Raises:
        ValueError: The environment variable has no known value, or asks for what is not here.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or type(x) not in (Tensor, nn.Parameter) or _is_observed():
        return TORCH
    switch = os.environ.get(SWITCH, "auto")
    if switch == "auto" and x.numel() < max(FEWEST_TOKENS * x.shape[-1], FEWEST_VALUES):
        return TORCH
    return ONEDNN if multiplies(switch) else TORCH


def _is_observed() -> bool:
    """Whether somebody traces, counts or differentiates the operations, who knows PyTorch's own alone."""
    return torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling()


@functools.cache
def multiplies(switch: str) -> bool:
    """Whether oneDNN does, with this value of the environment variable."""
    if switch not in ("auto", "torch", "onednn"):
        raise ValueError(f"{SWITCH}={switch!r} is not known: use auto, torch or onednn")
    if switch == "torch" or (switch == "auto" and not torch_is_slow()):
        return False
    found = is_here()
    if switch == "onednn" and not found:
        raise ValueError(f"{SWITCH}=onednn, but this PyTorch has no oneDNN: unset it")
    return found


@functools.cache
def torch_is_slow() -> bool:
    """Whether PyTorch's choice leaves half of this processor unused."""
    return torch.backends.mkl.is_available() and is_wide_amd()


def is_here() -> bool:
    """Whether oneDNN can be called, and multiplies; the operator is PyTorch's own and may change."""
    a, b = torch.arange(6.0).view(2, 3), torch.eye(3, 4)
    try:
        return torch.equal(ONEDNN.mm(a, b), a @ b)
    except (AttributeError, RuntimeError):
        return False


def is_wide_amd() -> bool:
    """Whether this is an AMD processor that computes 512 bits at a time."""
    try:
        lines = _CPUINFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return False
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = facts.get("cpu family", "")
    wide = family.isdigit() and int(family) >= _FIRST_WIDE_AMD_FAMILY and "avx512f" in facts.get("flags", "").split()
    return facts.get("vendor_id") == "AuthenticAMD" and wide


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Of two bfloat16 matrices, in float32: a product of two such numbers is exact there.

    A GPU's tensor cores multiply them as they are and add up in float32.
    """
    if on_gpu(a) and a.numel() and b.numel():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
