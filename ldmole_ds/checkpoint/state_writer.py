"""Writing a training state: every rank dumps the flat buffers it owns, rank 0 writes where everything lies.

Nothing is gathered and nothing is written twice: with W ranks each file holds its share of the float32 weights and of
the optimizer's moments. The index says which canonical elements lie where.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from ldmole_ds.checkpoint.canonical import Span
    from ldmole_ds.distributed.optimizer_shards import Flat

STATE_FOLDER, INDEX_NAME, FORMAT, VERSION = "training_state", "index.json", "ldmole_ds training state", 1


def shard_name(rank: int, world_size: int) -> str:
    """File of one rank, in `STATE_FOLDER`."""
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    # A view of a larger buffer would drag the buffer along.
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def write_shard(folder: Path, rank: int, world_size: int, flats: list[Flat], spans: list[list[Span]]) -> dict[str, Any]:
    """Write the buffers of this rank; returns what the index says about them.

    Args:
        folder: Of the checkpoint.
        rank, world_size: Name the file.
        flats: Buffers this rank owns, with their optimizer state.
        spans: Of each buffer, where its elements lie in the canonical form.

    Raises:
        ValueError: The optimizer keeps state that is not element by element.
    """
    tensors: dict[str, torch.Tensor] = {}
    records = []
    for number, (flat, places) in enumerate(zip(flats, spans, strict=True)):
        moments = flat.moments()
        for name, value in {"weight": flat.weight, **moments}.items():
            tensors[f"{number}.{name}"] = _whole(value)
        records.append(
            {
                "moments": sorted(moments),
                "step": flat.step,
                "hyperparameters": flat.hyperparameters(),
                "pieces": [[span.key, span.canonical, span.start, span.numel] for span in places],
            }
        )
    path = folder / STATE_FOLDER / shard_name(rank, world_size)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return {"file": path.name, "flats": records}


def write_index(folder: Path, shapes: dict[str, tuple[int, ...]], shards: list[dict], **facts: Any) -> None:
    """Write the index. On rank 0, with what `write_shard` returned on every rank that owns something.

    Args:
        folder: Of the checkpoint.
        shapes: Shape of every canonical tensor.
        shards: One record per file.
        facts: What else describes the state: layout, loss scale, counters.
    """
    index = {"format": FORMAT, "version": VERSION, **facts, "shapes": shapes, "shards": shards}
    (folder / STATE_FOLDER / INDEX_NAME).write_text(json.dumps(index) + "\n", encoding="utf-8")
