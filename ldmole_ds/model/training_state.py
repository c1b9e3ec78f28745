"""Saving and loading the training state of an `LDMoLEModel`: weights, moments, counters, in any layout.

    save_checkpoint(engine, "runs/mine/checkpoint-40")        # a loop of one's own
    load_checkpoint(engine, "runs/mine/checkpoint-40")        # the same or any other ranks, ep_size, ZeRO stage

`save_state` and `load_state` are the parts that the Trainer puts into its own checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldmole_ds.checkpoint import (
    STATE_FOLDER,
    CheckpointError,
    Span,
    TrainingState,
    overlaps,
    problem_of,
    save_folder,
    write_index,
    write_shard,
)
from ldmole_ds.config import CONFIG_NAME
from ldmole_ds.distributed.agreement import everyones, raise_together
from ldmole_ds.distributed.optimizer_shards import Flat, OptimizerShards
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.canonical import L1_EXPONENT, canonical_shapes, canonical_spans

_ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def save_checkpoint(engine: Any, folder: str | Path) -> None:
    """Write a checkpoint folder from a DeepSpeed engine around an `LDMoLEModel`. Collective.

    The folder appears when it is complete; see `ldmole_ds.checkpoint.folder`. The random state and the position in the
    data are the caller's.

    Raises:
        CheckpointError: On every rank, if any could not write.
    """
    rank, _ = _place()
    save_folder(Path(folder), lambda staging: save_state(engine.module, engine.optimizer, staging, engine), rank)


def load_checkpoint(engine: Any, folder: str | Path) -> None:
    """Load what `save_checkpoint` or the Trainer wrote, in this or another layout. Collective.

    Raises:
        CheckpointError: Damaged, incomplete, or of another adapter; nothing has been loaded then.
    """
    check_folder(Path(folder))
    load_state(engine.module, engine.optimizer, Path(folder), engine)


def check_folder(folder: Path) -> None:
    """Compare all files with the manifest, each rank its share. Collective.

    Raises:
        CheckpointError: On every rank, if any file is not what was written.
    """
    problem = first_problem(folder)
    if problem:
        raise CheckpointError(f"{folder} is damaged: {problem}; resume from an older checkpoint")


def first_problem(folder: Path) -> str | None:
    """What `problem_of` finds, over all ranks. Collective."""
    rank, world_size = _place()
    return next(filter(None, everyones(problem_of(folder, rank=rank, world_size=world_size))), None)


def save_state(model: LDMoLEModel, optimizer: Any, folder: Path, engine: Any = None) -> list[Path]:
    """Write training state and adapter configuration into ``folder``. Collective; errors are this rank's own.

    Args:
        model: Under any layout.
        optimizer: The engine's, or one of torch's.
        folder: Exists.
        engine: Of DeepSpeed, for its counters and loss scale.

    Returns:
        The files this rank wrote.
    """
    rank, world_size = _place()
    record, error = None, None
    try:
        shards = OptimizerShards(model, optimizer)
        if rank == 0 or not shards.replicated:
            record = write_shard(folder, rank, world_size, shards.flats, _spans_of(model, shards.flats))
    except Exception as caught:  # the others wait for this rank's record
        error = caught
    records = everyones(record)
    if error:
        raise error
    if rank == 0:
        facts = {
            "layout": {
                "world_size": world_size,
                "ep_size": model.topology.ep_size,
                "zero_stage": engine.zero_optimization_stage() if engine is not None else None,
            },
            "optimizer": type(shards.flats[0].optimizer).__name__ if shards.flats else None,
            "engine": _engine_facts(engine),
            L1_EXPONENT: int(model.adaptive_l1.exponent) if model.adaptive_l1 is not None else None,
        }
        write_index(folder, canonical_shapes(model), [r for r in records if r is not None], **facts)
        config = json.dumps(model.adapter_config.to_dict(), indent=2) + "\n"
        (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
    return [folder / STATE_FOLDER / record["file"]] if record else []


def load_state(
    model: LDMoLEModel, optimizer: Any, folder: Path, engine: Any = None, *, weights_only: bool = False
) -> dict[str, Any]:
    """Load a training state into this layout; each rank reads what it holds. Collective.

    Args:
        model, optimizer, engine: As in `save_state`.
        folder: Of the checkpoint.
        weights_only: Leave moments and counters as they are.

    Returns:
        What the index says of the layout that wrote it.

    Raises:
        CheckpointError: The state does not fit this model; nothing has been loaded.
    """
    with raise_together(CheckpointError):
        state = TrainingState(folder)
        state.check_fits(canonical_shapes(model))
        shards = OptimizerShards(model, optimizer)
    with raise_together(lambda reason: CheckpointError(f"{folder} could not be read: {reason}")):
        first_spans = {param: spans[0] for param, spans in canonical_spans(model).items()}
        for flat, spans in zip(shards.flats, _spans_of(model, shards.flats), strict=True):
            _fill(flat, spans, state)
            if not weights_only:
                _restore_optimizer(flat, spans, state, first_spans[flat.parameters[0]])
    shards.publish()
    if model.adaptive_l1 is not None:
        model.adaptive_l1.exponent.fill_(state.facts[L1_EXPONENT])
    if engine is not None and not weights_only:
        _restore_engine(engine, state.facts["engine"])
    return state.facts["layout"]


def _place() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _spans_of(model: LDMoLEModel, flats: list[Flat]) -> list[list[Span]]:
    """For every buffer, where its elements lie in the canonical form."""
    spans = canonical_spans(model)
    return [
        [span for run in flat.runs for span in overlaps(spans[run.parameter], run.start, run.numel, run.offset)]
        for flat in flats
    ]


def _fill(flat: Flat, spans: list[Span], state: TrainingState) -> None:
    for span in spans:
        state.read_into(flat.weight.narrow(0, span.start, span.numel), "weight", span.key, span.canonical)


def _restore_optimizer(flat: Flat, spans: list[Span], state: TrainingState, first: Span) -> None:
    """Moments, steps and hyperparameters of a buffer; ``first`` lies in its group, also where none of it is here."""
    moments = {}
    for name in state.moments():
        moments[name] = torch.zeros_like(flat.weight)
        for span in spans:
            state.read_into(moments[name].narrow(0, span.start, span.numel), name, span.key, span.canonical)
    records = [state.flat_of(span.key, span.canonical) for span in [first, *spans]]
    flat.restore(moments, max(record["step"] for record in records), records[0]["hyperparameters"])


def _engine_facts(engine: Any) -> dict[str, Any] | None:
    if engine is None:
        return None
    facts: dict[str, Any] = {name: int(getattr(engine, name)) for name in _ENGINE_COUNTERS}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        facts["loss_scaler"] = {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float, bool))}
    scheduler = getattr(engine, "lr_scheduler", None)
    if scheduler is not None and type(scheduler).__module__.startswith("deepspeed"):
        facts["lr_scheduler"] = scheduler.state_dict()
    return facts


def _restore_engine(engine: Any, facts: dict[str, Any] | None) -> None:
    if facts is None:  # saved without DeepSpeed
        return
    for name in _ENGINE_COUNTERS:
        setattr(engine, name, facts[name])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and "loss_scaler" in facts:
        vars(scaler).update({k: v for k, v in facts["loss_scaler"].items() if k in vars(scaler)})
    if "lr_scheduler" in facts and getattr(engine, "lr_scheduler", None) is not None:
        engine.lr_scheduler.load_state_dict(facts["lr_scheduler"])
