"""Checkpoints of every layout loaded into every other: bit for bit, and training goes on as one dense process.

Collective: `save_layouts` and `load_pairs` run on every rank of a job, with the layouts of its number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from ldmole_ds.checkpoint import TrainingState
from ldmole_ds.model.adapter_io import gather_adapter_state
from ldmole_ds.model.canonical import adapter_state
from ldmole_ds.model.training_state import load_checkpoint, save_checkpoint, save_state
from ldmole_ds.parity.cells import LAYOUTS, Cell
from ldmole_ds.parity.dense import STEPS, Run
from ldmole_ds.parity.engine import build_engine, train_steps

SAVED_AT = 3
CELLS = [Cell(layout, stage) for layout in LAYOUTS for stage in ("1", "2", "3")]
_TENSORS = ("weight", "exp_avg", "exp_avg_sq")


def checkpoint_of(folder: str | Path, cell: Cell) -> Path:
    """Where the checkpoint of a layout is kept."""
    return Path(folder) / f"checkpoint-{CELLS.index(cell)}"


def save_layouts(rank: int, world_size: int, folder: str) -> None:
    """Train `SAVED_AT` steps in every layout of this many ranks, and save."""
    for cell in CELLS:
        if cell.world_size == world_size:
            engine = build_engine(cell)
            train_steps(engine, cell, range(SAVED_AT), Run())
            save_checkpoint(engine, checkpoint_of(folder, cell))
            engine.destroy()


def load_pairs(
    rank: int, world_size: int, folder: str, pairs: list[tuple[Cell, Cell]]
) -> dict[tuple[Cell, Cell], tuple[list[str], Run]]:
    """For each (source, target) whose target has this many ranks: what differs, and the steps that follow.

    The target's weights, moments and steps are written again and compared with the source's, and its live weights, as
    they are gathered for an adapter file, as well.
    """
    results = {}
    for target in dict.fromkeys(target for _, target in pairs if target.world_size == world_size):
        engine = build_engine(target)
        for source in [source for source, other in pairs if other == target]:
            load_checkpoint(engine, checkpoint_of(folder, source))
            again = Path(folder) / f"again-{world_size}"
            if rank == 0:
                again.mkdir(exist_ok=True)
            dist.barrier()
            save_state(engine.module, engine.optimizer, again, engine)
            live, problems = gather_adapter_state(engine.module), []
            if rank == 0:
                saved = TrainingState(checkpoint_of(folder, source))
                problems = differences(saved, TrainingState(again))
                expected = adapter_state(saved)
                if live.keys() != expected.keys() or any(not torch.equal(live[k], expected[k]) for k in live):
                    problems.append("the model's own weights")
            run = Run()
            train_steps(engine, target, range(SAVED_AT, STEPS), run)
            results[source, target] = (problems, run)
        engine.destroy()
    return results


def differences(one: TrainingState, other: TrainingState) -> list[str]:
    """Names of what is not the same bit for bit in two training states."""
    if one.shapes != other.shapes:
        return ["keys or shapes"]
    found = []
    for key in one.shapes:
        found += [f"{key}.{n}" for n in _TENSORS if not torch.equal(one.read(key, n), other.read(key, n))]
        records = one.flat_of(key, 0), other.flat_of(key, 0)
        found += [f"{key}: {n}" for n in ("moments", "step", "hyperparameters") if records[0][n] != records[1][n]]
    return found
