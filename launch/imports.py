"""Imports without the garbage collector.

What a training job imports makes some hundred thousand objects that stay. While they come, the collector would look at
all of them again and again: a sixth of the time that importing takes. Later it need not look at them either. This file
imports the standard library alone.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collections within; afterwards the collector leaves alone what is there."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
