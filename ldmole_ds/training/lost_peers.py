"""A collective failed outside of the experts' exchange, in DeepSpeed or the Trainer: say which, as `PeerError` does."""

from __future__ import annotations

import os
import traceback
from pathlib import PurePath

import torch.distributed as dist


def lost_peer(error: BaseException) -> str | None:
    """Where this rank stood, if ``error`` is a failed collective, else None."""
    frames = traceback.extract_tb(error.__traceback__)
    in_torch = bool(frames) and "distributed" in PurePath(frames[-1].filename).parts
    by_backend = isinstance(error, dist.DistBackendError) or isinstance(error, RuntimeError) and "gloo" in str(error)
    if not by_backend and not (isinstance(error, RuntimeError) and in_torch):
        return None
    outside = [f for f in frames if "torch" not in PurePath(f.filename).parts]
    caller = outside[-1] if outside else frames[-1]
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"rank {os.environ.get('RANK', '0')} stopped in phase '{caller.name}' of {PurePath(caller.filename).name}: a "
        f"peer died or hangs, look for the first error in the other ranks' output ({reason})"
    )
