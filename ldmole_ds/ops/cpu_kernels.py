"""This package's C functions: built at the first call, with what each takes.

All tensors are given by their addresses: contiguous, float32 (masks and flags uint8), on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ldmole_ds.ops import c_library, kernel_watch

_FILES = ("routing.c", "group.c", "routing.h", "block.h", "parts.h")
SOURCES = tuple(Path(__file__).with_name("csrc") / name for name in _FILES)
# Of tensors, sizes, options, and threads.
_SIGNATURES = {"routing_forward": "ttttttt|nnnnnn|i|i", "routing_backward": "ttttttt|nnnn|i|i"}
_SIGNATURES |= {"group_forward": "ttttttttttt|nnnnnn|if|i", "group_backward": "tttttttt|nnnnnn|if|i"}
_TYPES = {"t": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


@functools.cache
def _functions() -> dict[str, Callable]:
    library = c_library.load(SOURCES)
    functions = {name: getattr(library, name) for name in _SIGNATURES}
    for name, function in functions.items():
        function.argtypes = [_TYPES[letter] for letter in _SIGNATURES[name].replace("|", "")]
    return functions


@functools.cache
def why_not() -> str | None:
    """Why the functions cannot run here; None if they can. The first call builds them where that was not done."""
    try:
        _functions()
    except c_library.NoCompilerError as error:
        return str(error)
    return None


def call(name: str, *args: Tensor | int | float | None) -> None:
    """Run one of them, in as many threads as PyTorch's operations run in. On fake tensors it has nothing to do.

    Raises:
        MemoryError: There is none for its scratch space.
    """
    kernel_watch.tell(args)
    if isinstance(args[0], FakeTensor):
        return
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    if _functions()[name](*given, torch.get_num_threads()):
        raise MemoryError("no memory for the routing kernel's scratch space")
