"""DeepSpeed's own checkpoints, made right for partitioned experts and frozen bases."""

from __future__ import annotations

from typing import Any


def adapt_engine(engine: Any) -> None:
    """Make ``engine.save_checkpoint`` leave out frozen weights, and ``load_checkpoint`` restore this rank's experts.

    DeepSpeed's stages 1 and 2 write one module file, with rank 0's experts; every rank's own experts are in its
    optimizer shard. After loading, the low-precision parameters must be copied from there, or the first step would run
    with rank 0's experts everywhere.
    """
    if getattr(engine, "_ldmole_adapted", False):
        return
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(save_dir, tag=None, client_state=None, save_latest=True, exclude_frozen_parameters=True):
        return save(save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters=True)

    def load_checkpoint(load_dir, *args, **kwargs):
        kwargs["load_module_strict"] = False
        result = load(load_dir, *args, **kwargs)
        if engine.zero_optimization_stage() in (1, 2):
            engine.optimizer.update_lp_params()
        return result

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    engine._ldmole_adapted = True
