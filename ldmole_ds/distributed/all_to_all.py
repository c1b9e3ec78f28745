"""The collectives of expert parallelism, each an autograd twin, and the count of what they move.

Backward of an exchange is the exchange with its splits swapped: what rank a sent to rank b comes back as gradient from
b to a. Every rank enters forward and backward in the same order whatever its sizes are; empty sends and receives too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
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


class Exchange:
    """A variable-split all-to-all under way: rows leave at once, `wait` returns what arrived.

    Args:
        x: ``(sum(input_splits), ...)``: rows for rank 0 of the group, then for rank 1, ...
        output_splits: Rows received from each rank of the group; may hold zeros.
        input_splits: Rows sent to each rank of the group; may hold zeros.
        group: The EP group.
        stats: Counts calls, rows and bytes under ``phase``.
        phase: Named in errors.
    """

    def __init__(
        self,
        x: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        group: dist.ProcessGroup,
        stats: CommStats,
        phase: str,
    ) -> None:
        own = dist.get_rank(group)
        remote_rows = sum(input_splits) - input_splits[own]
        stats.add(phase, remote_rows, remote_rows * math.prod(x.shape[1:]) * x.element_size())
        self._phase = phase
        self._rows = x.contiguous()  # kept alive until the exchange is over
        self._out = x.new_empty((sum(output_splits), *x.shape[1:]))
        try:
            self._work = dist.all_to_all_single(
                self._out, self._rows, output_splits, input_splits, group=group, async_op=True
            )
        except RuntimeError as error:
            raise self._failed(error) from error

    def wait(self) -> Tensor:
        """The rows received, ordered by source rank."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._failed(error) from error
        return self._out

    def _failed(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"the expert-parallel exchange failed in phase '{self._phase}' on rank {dist.get_rank()}: a peer has died "
            f"or hangs, look at the other ranks' logs for the first error ({error})"
        )


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, output_splits, input_splits, group, stats, phase):
        ctx.args = (input_splits, output_splits, group, stats, f"{phase}_backward")
        return Exchange(x, output_splits, input_splits, group, stats, phase).wait()

    @staticmethod
    def backward(ctx, grad):
        return Exchange(grad, *ctx.args).wait(), None, None, None, None, None


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
    def forward(ctx, group, stats, *tensors):
        num_ranks = dist.get_world_size(group)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        gathered = flat.new_empty(num_ranks, flat.numel())
        stats.add("gather", num_ranks - 1, (num_ranks - 1) * flat.numel() * flat.element_size())
        dist.all_gather(list(gathered.unbind(0)), flat, group=group)
        ctx.group, ctx.stats, ctx.shapes = group, stats, [t.shape for t in tensors]
        parts = gathered.split([t.numel() for t in tensors], dim=1)
        return tuple(part.reshape(num_ranks, *t.shape) for part, t in zip(parts, tensors, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        num_ranks = dist.get_world_size(ctx.group)
        flat = torch.cat([g.reshape(num_ranks, -1) for g in grads], dim=1)
        out = flat.new_empty(flat.shape[1])
        ctx.stats.add("reduce_scatter", num_ranks - 1, (num_ranks - 1) * out.numel() * out.element_size())
        dist.reduce_scatter(out, list(flat.unbind(0)), group=ctx.group)
        parts = out.split([shape.numel() for shape in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def gather_experts(
    lora_A: Tensor, lora_B: Sequence[Tensor], group: dist.ProcessGroup, stats: CommStats
) -> tuple[Tensor, list[Tensor]]:
    """All experts of the group from the local ones: ``(G, e, r, D), G x (e, r, O_g) -> (G, E, r, D), G x (E, r, O_g)``.

    One all-gather for the whole input group; backward is one reduce-scatter that sums every rank's gradient at the
    expert's home.
    """
    all_A, *all_B = _GatherExperts.apply(group, stats, lora_A, *lora_B)
    return all_A.transpose(0, 1).flatten(1, 2), [b.flatten(0, 1) for b in all_B]
