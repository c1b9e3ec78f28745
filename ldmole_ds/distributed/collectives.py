"""Collectives of an EP group: through memory that its ranks share where that is open, else `torch.distributed`'s.

Tensors are contiguous. Backends that queue their work, as NCCL does, return before it is done; `wait` queues behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed.mailboxes import Mailboxes


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Returns when its result can be used."""


@dataclass(frozen=True)
class Collectives:
    """Every rank of ``group`` calls each of them, in the same order."""

    group: dist.ProcessGroup
    mailboxes: Mailboxes | None = None

    @property
    def size(self) -> int:
        """Ranks in the group, P."""
        return dist.get_world_size(self.group)

    def all_to_all(
        self, out: Tensor, x: Tensor, output_splits: list[int] | None = None, input_splits: list[int] | None = None
    ) -> Work:
        """Rows of ``x`` to rank 0, then to rank 1, ...; ``out`` is filled by the time of ``wait``.

        Args:
            out: ``(sum(output_splits), ...)``, ordered by source rank.
            x: ``(sum(input_splits), ...)``; not to be changed before ``wait``.
            output_splits, input_splits: Rows from and to each rank; the same number without them.
        """
        mailboxes = self._mailboxes(x)
        if mailboxes is None:
            return dist.all_to_all_single(out, x, output_splits, input_splits, group=self.group, async_op=True)
        return mailboxes.begin(self._parts(out, output_splits), self._parts(x, input_splits))

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Every rank's ``x (n,)``, one after another, into ``out (P * n,)``."""
        mailboxes = self._mailboxes(x)
        if mailboxes is None:
            dist.all_gather_into_tensor(out, x, group=self.group)
            return
        parts = self._parts(out)
        mailboxes.begin(parts, [x] * len(parts)).wait()

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """Into ``out (n,)`` the sum of all ranks' part for this rank of ``x (P * n,)``."""
        mailboxes = self._mailboxes(x)
        if mailboxes is None:
            dist.reduce_scatter_tensor(out, x, group=self.group)
            return
        received = torch.empty_like(x)
        mailboxes.begin(self._parts(received), self._parts(x)).wait()
        torch.sum(received.view(-1, *out.shape), 0, out=out)

    def _mailboxes(self, x: Tensor) -> Mailboxes | None:
        return self.mailboxes if x.device.type == "cpu" else None

    def _parts(self, x: Tensor, splits: list[int] | None = None) -> tuple[Tensor, ...]:
        return x.tensor_split(self.size) if splits is None else x.split(splits)
