"""Dense or grouped: how the experts' products of a batch are computed.

Shape legend: N tokens at the experts, D in_features, G projections, e local experts, r rank, O_g out_features of
projection g, P active pairs (projection, token, expert).

    dense      every expert for every token, two large products              `ldmole_ds.ops.lora_experts`
    grouped    active pairs alone, small products and rows moved for each    `ldmole_ds.ops.grouped_experts`

Dense costs by N * G * e * r, grouped by P and by the experts in use; `dense_operations` and `grouped_operations` are
their costs in one unit. The environment variable ``LDMOLE_EXPERT_COMPUTE`` says who chooses:

    auto       the default: the cheaper one, for each input group and batch anew
    dense      always dense
    grouped    always grouped; an error where it cannot run, which is anywhere but on a CPU

Both give the same numbers up to rounding, so ranks may differ in their choice. ``auto`` is dense on a GPU, which the
host would have to wait for to learn who is active, and in half precision, where dense products have units of their own.
What is traced without values, by ``torch.compile`` or the planner, is dense whatever is set; but a plan for a CPU knows
which layers `may_be_grouped` (`ldmole_ds.ops.planned`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ldmole_ds.ops import matrix_products
from ldmole_ds.ops.grouped_experts import GROUPED
from ldmole_ds.ops.lora_experts import DENSE, Products
from ldmole_ds.ops.planned import planned_cpu

SWITCH = "LDMOLE_EXPERT_COMPUTE"

# Of forward and backward, in operations of a large float32 product: moving a value of a pair's rows and of a token's,
# and calling an expert's products. Fitted to times of one CPU core over experts of 4 x 8 to 128 x 32, 16 to 4,096
# tokens, 1 to 16 active, D of 256 and 768; `benchmarks/expert_compute.py` holds the choice against the times.
PER_PAIR_VALUE, PER_TOKEN_VALUE, PER_EXPERT = 230.0, 150.0, 4e6
# On AMD's processors from Zen 5 on, whose dense products of tokens that travel stay with a slow library, this times as
# fast beside them: then the choice is right in all of 134 cells there.
BESIDE_SLOW_PRODUCTS = 2.0


def dense_operations(rows: float, num_experts: int, r: int, in_features: int, out_features: Sequence[int]) -> float:
    """Cost of one forward and backward over ``rows`` tokens with ``num_experts`` local experts."""
    return 6 * rows * num_experts * r * _width(in_features, out_features)


def grouped_operations(
    pairs: float, rows: float, num_experts: int, r: int, in_features: int, out_features: Sequence[int]
) -> float:
    """The same of ``pairs`` active pairs in all projections."""
    num_groups, width = len(out_features), _width(in_features, out_features)
    moved_and_multiplied = pairs * width / num_groups * (6 * r + PER_PAIR_VALUE)
    return moved_and_multiplied + rows * width * PER_TOKEN_VALUE + min(num_groups * num_experts, pairs) * PER_EXPERT


def _width(in_features: int, out_features: Sequence[int]) -> int:
    """Of a token's rows, in all projections."""
    return len(out_features) * in_features + sum(out_features)


def grouped_speed() -> float:
    """Of grouped products beside that of dense ones: large products use all threads, small ones a single one."""
    return 1 / torch.get_num_threads()


def grouped_margin() -> float:
    """How much more `choose_products` thinks of grouped products than `grouped_speed` says."""
    return BESIDE_SLOW_PRODUCTS if matrix_products.torch_is_slow() else 1.0


def may_group_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype may be grouped there, in a layer large enough.

    Raises:
        ValueError: The environment variable has no known value, or asks for what cannot run.
    """
    switch, on_cpu = os.environ.get(SWITCH, "auto"), device.type == "cpu"
    if switch not in ("auto", "dense", "grouped"):
        raise ValueError(f"{SWITCH}={switch!r} is not known: use auto, dense or grouped")
    if switch == "grouped" and not on_cpu:
        raise ValueError(f"{SWITCH}=grouped, but the tensors are on a GPU: unset it (grouped products run on a CPU)")
    return switch == "grouped" or (switch == "auto" and on_cpu and dtype.itemsize >= 4)


def may_be_grouped(
    rows: int, lora_A: Tensor, out_features: Sequence[int], num_experts: int | None = None, beside: float = 1.0
) -> bool:
    """Whether grouped products may be the choice for so many tokens, whatever their routing; see the module docstring.

    Args:
        rows: N.
        lora_A: ``(G, e, r, D)``.
        out_features: O_g of each projection.
        num_experts: How many experts will be here, if not those of ``lora_A``.
        beside: Times `grouped_speed`.

    Raises:
        ValueError: As `may_group_on`.
    """
    planned = planned_cpu(lora_A)
    traced = torch.compiler.is_compiling() or (isinstance(lora_A, FakeTensor) and planned is None)
    if traced or not may_group_on(lora_A.device, lora_A.dtype):
        return False
    # A token has an expert here as a rule: with fewer pairs than that a small layer loses little.
    _, e, r, d = lora_A.shape
    layer = (num_experts or e, r, d, out_features)
    speed = grouped_speed() if planned is None else planned.grouped_speed
    return _is_forced() or _grouped_is_cheaper(rows * len(out_features), rows, layer, speed * beside)


def choose_products(w_NGe: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor]) -> Products:
    """The products for tokens with routing weights ``(N, G, e)``; see the module docstring.

    Dense ones are PyTorch's library's here (`ldmole_ds.ops.lora_experts`).

    Raises:
        ValueError: As `may_group_on`.
    """
    rows, out_features = len(w_NGe), [b.shape[-1] for b in lora_B]
    if torch.compiler.is_compiling() or isinstance(lora_A, FakeTensor):
        return DENSE
    beside = grouped_margin()
    if not may_be_grouped(rows, lora_A, out_features, beside=beside):
        return DENSE
    if _is_forced():
        return GROUPED
    pairs = int(torch.count_nonzero(w_NGe))
    layer = (*lora_A.shape[1:], out_features)
    return GROUPED if _grouped_is_cheaper(pairs, rows, layer, beside * grouped_speed()) else DENSE


def _is_forced() -> bool:
    return os.environ.get(SWITCH) == "grouped"


def _grouped_is_cheaper(pairs: int, rows: int, layer: tuple[int, int, int, Sequence[int]], speed: float) -> bool:
    return grouped_operations(pairs, rows, *layer) < dense_operations(rows, *layer) * speed
