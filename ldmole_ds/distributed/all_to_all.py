"""The collectives of expert parallelism, each an autograd twin, and the count of what they move.

Backward of an exchange is the exchange with its splits swapped: what rank a sent to rank b comes back as gradient from
b to a. Every rank enters forward and backward in the same order whatever its sizes are; empty sends and receives too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed.collectives import Collectives
from ldmole_ds.distributed.mailboxes import Mailboxes


@dataclass
class CommStats:
    """What the collectives of this rank have moved, forward and backward, counted where they are called.

    ``calls``, ``rows`` and ``bytes`` are keyed by phase: counts, dispatch, combine, dispatch_backward,
    combine_backward, gather, reduce_scatter. Rows and bytes are those *sent to other ranks*.
    ``step`` is where training stands, for errors.
    """

    calls: Counter = field(default_factory=Counter)
    rows: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    step: int = 0

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


class PeerError(RuntimeError):
    """A collective between expert-parallel ranks failed: a peer died, hangs, or left. Says where this rank stood."""


@dataclass(frozen=True)
class Channel:
    """The way of one layer's collectives.

    Attributes:
        group: The EP group.
        stats: Counts calls, rows and bytes by phase.
        layer: Named in errors.
        mailboxes: Of the group, where its ranks share memory.
    """

    group: dist.ProcessGroup
    stats: CommStats
    layer: str
    mailboxes: Mailboxes | None = None

    @property
    def size(self) -> int:
        """Ranks in the group, P."""
        return self.collectives.size

    @property
    def own_rank(self) -> int:
        """This rank's index in the group."""
        return dist.get_rank(self.group)

    @property
    def collectives(self) -> Collectives:
        """How its ranks reach each other."""
        return Collectives(self.group, self.mailboxes)

    @contextmanager
    def guard(self, phase: str) -> Iterator[None]:
        """Turns the backend's error into a `PeerError` that names layer, phase and step."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PeerError(
                f"rank {dist.get_rank()} stopped in phase '{phase}' of {self.layer}, step {self.stats.step}: a peer "
                f"died or hangs, look for the first error in the other ranks' output ({reason})"
            ) from error


class Exchange:
    """A variable-split all-to-all under way: rows leave at once, `wait` returns what arrived.

    Args:
        x: ``(sum(input_splits), ...)``: rows for rank 0 of the group, then for rank 1, ...
        output_splits: Rows received from each rank of the group; may hold zeros.
        input_splits: Rows sent to each rank of the group; may hold zeros.
        channel: Group, statistics and layer.
        phase: Under which the exchange is counted, and named in errors.

    Attributes:
        out: What will be filled; to be read after `wait`.
    """

    def __init__(
        self, x: Tensor, output_splits: list[int], input_splits: list[int], channel: Channel, phase: str
    ) -> None:
        remote_rows = sum(input_splits) - input_splits[channel.own_rank]
        channel.stats.add(phase, remote_rows, remote_rows * math.prod(x.shape[1:]) * x.element_size())
        self._channel, self._phase = channel, phase
        self._rows = x.contiguous()  # kept alive until the exchange is over
        self.out = x.new_empty((sum(output_splits), *x.shape[1:]))
        with channel.guard(phase):
            self._work = channel.collectives.all_to_all(self.out, self._rows, output_splits, input_splits)

    def wait(self) -> Tensor:
        """The rows received, ordered by source rank."""
        with self._channel.guard(self._phase):
            self._work.wait()
        return self.out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, output_splits, input_splits, channel, phase):
        ctx.args = (input_splits, output_splits, channel, f"{phase}_backward")
        return Exchange(x, output_splits, input_splits, channel, phase).wait()

    @staticmethod
    def backward(ctx, grad):
        return Exchange(grad, *ctx.args).wait(), None, None, None, None


def all_to_all(x: Tensor, output_splits: list[int], input_splits: list[int], channel: Channel, phase: str) -> Tensor:
    """An `Exchange`, waited for, that autograd runs backwards with the splits swapped.

    Args:
        x, output_splits, input_splits, channel: As in `Exchange`.
        phase: dispatch or combine; backward counts under ``phase + "_backward"``.

    Returns:
        ``(sum(output_splits), ...)``.
    """
    return _AllToAll.apply(x, output_splits, input_splits, channel, phase)


def exchange_counts(counts: Tensor, channel: Channel) -> Tensor:
    """Tell every rank of the group a few integers each: ``(P, n) int64 -> (P, n)``, row p from / to rank p."""
    out = torch.empty_like(counts)
    remote = counts.shape[0] - 1
    channel.stats.add("counts", remote, remote * counts[0].numel() * counts.element_size())
    with channel.guard("counts"):
        channel.collectives.all_to_all(out, counts).wait()
    return out


def largest_of(value: Tensor, channel: Channel) -> int:
    """The largest of one whole number ``()`` over the group. A host synchronisation."""
    box = value.long().view(1)
    channel.stats.add("counts", channel.size - 1, (channel.size - 1) * box.element_size())
    with channel.guard("counts"):
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=channel.group)
    return int(box)
