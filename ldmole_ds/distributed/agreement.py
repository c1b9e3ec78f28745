"""All ranks learn what went wrong on any: none walks on into a collective that another will never enter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def everyones(value: Any) -> list[Any]:
    """``value`` of every rank, by rank. Collective."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def raise_together(make_error: Callable[[str], Exception]) -> Iterator[None]:
    """Run a block without collectives; where it fails on any rank, all raise ``make_error(reason)``. Collective."""
    reason: str | None = None
    try:
        yield
    except Exception as error:  # whatever it was, the others must hear of it
        reason = f"{error}" or type(error).__name__
        if not isinstance(error, (OSError, ValueError)) and str(error):
            reason = f"{type(error).__name__}: {error}"
    reasons = everyones(reason)
    failed = [rank for rank, r in enumerate(reasons) if r]
    if failed:
        where = f" (rank {', '.join(map(str, failed))})" if len(failed) < len(reasons) else ""
        raise make_error(f"{reasons[failed[0]]}{where}")
