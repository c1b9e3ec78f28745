"""Reading a training state: any run of any canonical tensor, from whichever files hold it."""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldmole_ds.checkpoint.folder import CheckpointError
from ldmole_ds.checkpoint.state_writer import FORMAT, INDEX_NAME, STATE_FOLDER, VERSION


class _Piece(NamedTuple):
    canonical: int
    numel: int
    shard: int
    flat: int
    start: int


def has_training_state(folder: str | Path) -> bool:
    """Whether ``folder`` is a training checkpoint."""
    return (Path(folder) / STATE_FOLDER / INDEX_NAME).is_file()


class TrainingState:
    """The training state of a checkpoint folder, opened for reading.

    Attributes:
        facts: What the index says besides the places: layout, loss scale, counters.
        shapes: Shape of every canonical tensor.

    Raises:
        CheckpointError: There is none, or it contradicts itself: experts missing or saved twice.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / STATE_FOLDER
        path = self.folder / INDEX_NAME
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} holds no {STATE_FOLDER}/{INDEX_NAME}: give a checkpoint-N folder of a training run"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): use an older checkpoint") from error
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has format {index.get('format')!r} version {index.get('version')!r}, this ldmole_ds reads "
                f"{FORMAT!r} version {VERSION}: use the version that wrote it"
            )
        self.shapes = {key: tuple(shape) for key, shape in index.pop("shapes").items()}
        self._shards: list[dict] = index.pop("shards")
        self.facts: dict[str, Any] = index
        self._pieces: dict[str, list[_Piece]] = {key: [] for key in self.shapes}
        for s, shard in enumerate(self._shards):
            for f, flat in enumerate(shard["flats"]):
                for key, canonical, start, numel in flat["pieces"]:
                    if key not in self._pieces:
                        raise CheckpointError(f"{path} places {key}, whose shape it does not give: it is damaged")
                    self._pieces[key].append(_Piece(canonical, numel, s, f, start))
        for key, pieces in self._pieces.items():
            pieces.sort()
            self._check_cover(key, pieces)
        self._files: dict[int, Any] = {}

    def _check_cover(self, key: str, pieces: list[_Piece]) -> None:
        """Every element exactly once."""
        shape = self.shapes[key]
        total, position = _numel(shape), 0
        for piece in [*pieces, _Piece(total, 0, 0, 0, 0)]:
            if piece.canonical != position:
                first, last = sorted((piece.canonical, position))
                problem = "is missing" if piece.canonical > position else "is saved twice"
                raise CheckpointError(
                    f"{self.folder}: {key} {_place(shape, first, last)} {problem}: use another checkpoint"
                )
            position += piece.numel

    def check_fits(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse a state of another adapter, before anything is loaded.

        Raises:
            CheckpointError: A tensor is missing, unknown, or of another shape.
        """
        for key, shape in shapes.items():
            if key not in self.shapes:
                raise CheckpointError(f"{self.folder} lacks {key}: it is of a run with other adapter settings or model")
            if self.shapes[key] != tuple(shape):
                raise CheckpointError(
                    f"{self.folder}: {key} has shape {self.shapes[key]}, this run wants {tuple(shape)}: resume with "
                    "the adapter settings (num_experts, r, ...) and base model of the checkpoint"
                )
        unknown = sorted(self.shapes.keys() - shapes.keys())
        if unknown:
            raise CheckpointError(f"{self.folder} holds tensors this run has no place for: {unknown[:4]}")

    def flat_of(self, key: str, canonical: int) -> dict:
        """The record of the buffer that holds one element: its step and its group's hyperparameters."""
        piece = next(self._parts(key, canonical, 1))[0]
        return self._shards[piece.shard]["flats"][piece.flat]

    def moments(self) -> list[str]:
        """Names of the optimizer's moments, such as exp_avg."""
        return sorted({name for shard in self._shards for flat in shard["flats"] for name in flat["moments"]})

    def read_into(self, target: Tensor, name: str, key: str, canonical: int) -> None:
        """Fill a one-dimensional ``target`` with a run of a canonical tensor.

        Args:
            target: Any dtype and device.
            name: "weight" or one of `moments`; a moment that was not kept there is zero.
            key, canonical: The tensor and the first element of the run.
        """
        for piece, skip, at, numel in self._parts(key, canonical, target.numel()):
            part = target.narrow(0, at, numel)
            if name != "weight" and name not in self._shards[piece.shard]["flats"][piece.flat]["moments"]:
                part.zero_()
                continue
            begin = piece.start + skip
            part.copy_(self._file(piece.shard).get_slice(f"{piece.flat}.{name}")[begin : begin + numel])

    def read(self, key: str, name: str = "weight") -> Tensor:
        """One whole canonical tensor on the CPU, float32."""
        flat = torch.empty(_numel(self.shapes[key]))
        self.read_into(flat, name, key, 0)
        return flat.view(self.shapes[key])

    def _parts(self, key: str, canonical: int, numel: int):
        """Pieces that hold ``[canonical, canonical + numel)``: (piece, elements to skip in it, offset, length)."""
        pieces = self._pieces[key]
        index = bisect_right(pieces, canonical, key=lambda piece: piece.canonical) - 1
        done = 0
        while done < numel:
            piece = pieces[index]
            skip = canonical + done - piece.canonical
            length = min(piece.numel - skip, numel - done)
            yield piece, skip, done, length
            done, index = done + length, index + 1

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            path = self.folder / self._shards[shard]["file"]
            try:
                self._files[shard] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read ({error}): use an older checkpoint") from error
        return self._files[shard]


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _place(shape: tuple[int, ...], first: int, last: int) -> str:
    """A range of elements, as experts where the first dimension counts them."""
    if len(shape) < 2:
        return f"from element {first} to {last - 1}"
    stride = _numel(shape[1:])
    return f"of rows (experts) {first // stride} to {(last - 1) // stride}"
