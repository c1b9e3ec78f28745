"""One computation for all members of an input group, from which each takes its own result.

The first member always starts a new computation; each other member takes its slice once, after its input was checked to
be the same memory in the same version. The first member's input is held until then, so its memory cannot have been
reused. A mismatch raises: it never computes on the wrong tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_ds.ops.grouped_update import Update


def _memory_key(x: Tensor) -> tuple | None:
    """Equal for the same memory in the same version; None while ``torch.compile`` traces, which cannot look at it."""
    if torch.compiler.is_compiling():
        return None
    version = -1 if x.is_inference() else x._version
    grad_mode = torch.is_grad_enabled()
    return (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype, version, grad_mode)


@dataclass
class _Pending:
    """A result whose members have not all taken their slice: the input is kept alive, and its memory's key."""

    x: Tensor
    key: tuple | None
    results: Sequence[Tensor | Update]
    waiting: set[int]


class MemberResults:
    """Results by member, see the module docstring.

    Args:
        members: Full module names, in call order.

    Attributes:
        handed_on: ``(T, D)``, what the next member reads instead of x in a `frozen_product`; None where there is none.
    """

    def __init__(self, members: Sequence[str]) -> None:
        self.members = members
        self.pending: _Pending | None = None
        self.handed_on: Tensor | None = None

    def clear(self) -> None:
        """Forget what has not been taken."""
        self.pending = self.handed_on = None

    def take(self, member: int, x: Tensor, run: Callable[[], Sequence[Tensor | Update]]) -> Tensor | Update:
        """One member's result; ``run`` makes those of all for the first member that asks.

        Raises:
            RuntimeError: The input is not that of the first member.
        """
        pending = self.pending
        if pending is None or member == 0:
            results = run()
            if len(self.members) > 1:
                self.pending = _Pending(x, _memory_key(x), results, set(range(len(self.members))) - {member})
            return results[member]
        keys = {pending.key, _memory_key(x)}
        if member not in pending.waiting or (len(keys) > 1 and None not in keys):
            self.pending = None
            raise RuntimeError(
                f"{self.members[member]} was called on another input than {self.members[0]}, although both were found "
                "to read the same tensor: set input_groups='single' (--input_groups single) for this model"
            )
        pending.waiting.discard(member)
        if not pending.waiting:
            self.pending = None
        return pending.results[member]
