"""Resuming is exact with every engine setting that changes where weights and moments are kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldmole_ds.parity.cells import Cell
from ldmole_ds.parity.dense import Run
from tests.distributed_utils import engine_computes_in, run_distributed

PLAIN = Cell((2, 2), "2")
VARIANTS = {
    "bf16, stage 2": replace(PLAIN, dtype="bf16"),
    "bf16, stage 3": replace(PLAIN, dtype="bf16", stage="3"),
    "zero.Init": replace(PLAIN, stage="3 zero.Init"),
    "offload, stage 2": replace(PLAIN, offload=True),
    "offload, stage 3": replace(PLAIN, stage="3", offload=True),
    "optimizer from config": replace(PLAIN, stage="1", optimizer="config"),
    "accumulation": replace(PLAIN, accumulation=2),
    "relu": replace(PLAIN, router="relu"),
    "per layer": replace(PLAIN, stage="3", router="sparsegen, lambda per layer"),
    "fp16": PLAIN,
    "round robin": PLAIN,
    "scheduler from config": PLAIN,
}
CHANGES = {
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 3}},
    "round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "scheduler from config": {
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}},
    },
}
# Where another variant's checkpoint goes on in this one.
ACROSS = [("offload, stage 2", "bf16, stage 3"), ("bf16, stage 2", "optimizer from config")]


def resume_variants(rank, world_size, folder):
    import ldmole_ds.parity.engine as engine_of
    from ldmole_ds.model.adapter_io import gather_adapter_state
    from ldmole_ds.model.training_state import load_checkpoint, save_checkpoint

    plain_config, results = engine_of.ds_config, {}

    def build(name):
        engine_of.ds_config = lambda cell: {**plain_config(cell), **CHANGES.get(name, {})}
        cell = VARIANTS[name]
        return engine_of.build_engine(cell), cell

    def go_on(engine, cell):
        run = Run()
        engine_of.train_steps(engine, cell, range(3, 5), run)
        engine_facts = (engine.global_steps, engine.skipped_steps, engine.get_lr())
        return run.losses, run.norms, gather_adapter_state(engine.module), engine_facts

    for name in VARIANTS:
        if name == "fp16" and not engine_computes_in("fp16"):
            continue
        engine, cell = build(name)
        engine_of.train_steps(engine, cell, range(3), Run())
        save_checkpoint(engine, Path(folder) / name)
        whole = go_on(engine, cell)
        engine.destroy()
        engine, cell = build(name)
        load_checkpoint(engine, Path(folder) / name)
        results[name] = (whole, go_on(engine, cell))
        engine.destroy()
    for source, target in ACROSS:
        engine, cell = build(target)
        load_checkpoint(engine, Path(folder) / source)
        results[source, target] = go_on(engine, cell)[:2]
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("variants"))
    return run_distributed(resume_variants, 2, folder, deepspeed=True, timeout_s=300)


@pytest.mark.distributed
def test_resuming_is_exact(results):
    for per_rank in results:
        names = VARIANTS.keys() & per_rank.keys()
        assert VARIANTS.keys() - names <= {"fp16"}
        for name in names:
            (losses, norms, state, facts), again = per_rank[name]
            assert again[:2] == (losses, norms), name
            assert again[3] == facts, name
            assert state.keys() == again[2].keys()
            assert all(torch.equal(state[key], again[2][key]) for key in state), name


@pytest.mark.distributed
def test_other_engine_settings_go_on_from_it(results):
    """Another dtype or optimizer class computes a little differently, so the curve is close, not equal."""
    (losses, norms, *_), _ = results[0]["accumulation"]
    assert len(losses) == len(norms) == 2
    for source, target in ACROSS:
        found_losses, found_norms = results[0][source, target]
        (losses, norms, *_), _ = results[0][target]
        assert found_losses == pytest.approx(losses, rel=5e-3), (source, target)
        assert found_norms == pytest.approx(norms, rel=5e-2), (source, target)
