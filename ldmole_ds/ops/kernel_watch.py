"""Who traces a step learns here of the kernels in C and Triton, which PyTorch's dispatcher does not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_watcher: ContextVar[Callable[[list[Tensor]], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Within the block the watcher gets the tensors of each kernel, those read and those written, before it runs."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(arguments: Sequence[object]) -> None:
    """A kernel is about to run on these. A tensor that stands in two places is meant once."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(list({id(a): a for a in arguments if isinstance(a, Tensor)}.values()))
