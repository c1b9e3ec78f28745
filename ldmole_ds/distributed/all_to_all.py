"""The collectives of expert parallelism, each an autograd twin, and the count of what they move.

Backward of an exchange is the exchange with its splits swapped: what rank a sent to rank b comes back as gradient from
b to a. Every rank enters forward and backward in the same order whatever its sizes are; empty sends and receives too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class CommStats:
    """What the collectives of this rank have moved, forward and backward, counted where they are called.

    ``calls``, ``rows`` and ``bytes`` are keyed by phase: counts, dispatch, combine, dispatch_backward,
    combine_backward, gather, reduce_scatter. Rows and bytes are those *sent to other ranks*.
    """

    calls: Counter = field(default_factory=Counter)
    rows: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)

    def add(self, phase: str, rows: int, num_bytes: int) -> None:
        self.calls[phase] += 1
        self.rows[phase] += rows
        self.bytes[phase] += num_bytes

    def reset(self) -> None:
        self.calls.clear()
        self.rows.clear()
        self.bytes.clear()

    @property
    def total_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def _exchange(x: Tensor, output_splits: list[int], input_splits: list[int], group, stats: CommStats, phase: str):
    own = dist.get_rank(group)
    remote_rows = sum(input_splits) - input_splits[own]
    row_bytes = x[:1].numel() * x.element_size() if x.shape[0] else 0
    stats.add(phase, remote_rows, remote_rows * row_bytes)
    out = x.new_empty((sum(output_splits), *x.shape[1:]))
    try:
        dist.all_to_all_single(out, x.contiguous(), output_splits, input_splits, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"the expert-parallel exchange failed in phase '{phase}' on rank {dist.get_rank()}: a peer has died or "
            f"hangs, look at the other ranks' logs for the first error ({error})"
        ) from error
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, output_splits, input_splits, group, stats, phase):
        ctx.args = (input_splits, output_splits, group, stats, f"{phase}_backward")
        return _exchange(x, output_splits, input_splits, group, stats, phase)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, *ctx.args), None, None, None, None, None


def all_to_all(
    x: Tensor,
    output_splits: list[int],
    input_splits: list[int],
    group: dist.ProcessGroup,
    stats: CommStats,
    phase: str,
) -> Tensor:
    """Exchange rows with variable splits.

    Args:
        x: ``(sum(input_splits), ...)``: rows for rank 0 of the group, then for rank 1, ...
        output_splits: Rows received from each rank of the group; may hold zeros.
        input_splits: Rows sent to each rank of the group; may hold zeros.
        group: The EP group.
        stats: Counts calls, rows and bytes under ``phase`` (and ``phase + "_backward"``).
        phase: dispatch or combine.

    Returns:
        ``(sum(output_splits), ...)``. Backward is the same exchange with the splits swapped.
    """
    return _AllToAll.apply(x, output_splits, input_splits, group, stats, phase)


def exchange_counts(counts: Tensor, group: dist.ProcessGroup, stats: CommStats) -> Tensor:
    """Tell every rank of the group a few integers each: ``(P, n) int64 -> (P, n)``, row p from / to rank p."""
    out = torch.empty_like(counts)
    remote = counts.shape[0] - 1
    stats.add("counts", remote, remote * counts[0].numel() * counts.element_size())
    dist.all_to_all_single(out, counts, group=group)
    return out


class _GatherExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group, stats):
        ctx.dim, ctx.group, ctx.stats = dim, group, stats
        world_size = dist.get_world_size(group)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size)]
        stats.add("gather", world_size - 1, (world_size - 1) * x.numel() * x.element_size())
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad):
        world_size = dist.get_world_size(ctx.group)
        parts = [part.contiguous() for part in grad.chunk(world_size, ctx.dim)]
        out = torch.empty_like(parts[0])
        ctx.stats.add("reduce_scatter", world_size - 1, (world_size - 1) * out.numel() * out.element_size())
        dist.reduce_scatter(out, parts, group=ctx.group)
        return out, None, None, None


def gather_experts(x: Tensor, dim: int, group: dist.ProcessGroup, stats: CommStats) -> Tensor:
    """All-gather local experts along ``dim``; backward sums every rank's gradient at the expert's home."""
    return _GatherExperts.apply(x, dim, group, stats)
