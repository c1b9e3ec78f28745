"""Checkpoints of any layout load into any other. All pairs: `benchmarks/reshard_matrix.py`."""

import random

import pytest
from safetensors.torch import load_file, save_file

from ldmole_ds.checkpoint import TrainingState
from ldmole_ds.parity import dense_run
from ldmole_ds.parity.dense import STEPS
from ldmole_ds.parity.reshard import CELLS, SAVED_AT, checkpoint_of, differences, load_pairs, save_layouts
from tests.distributed_utils import run_distributed

# Every layout once as source and once as target, and never onto itself.
PAIRS = list(zip(random.Random(3).sample(CELLS, len(CELLS)), CELLS, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    for world_size in (1, 2, 4):
        run_distributed(save_layouts, world_size, folder, deepspeed=True, timeout_s=200)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    per_world = [
        run_distributed(load_pairs, world_size, folder, PAIRS, deepspeed=True, timeout_s=300)[0]
        for world_size in (1, 2, 4)
    ]
    return {pair: result for found in per_world for pair, result in found.items()}


def test_the_pairs_change_ranks_ep_size_and_stage():
    assert all(source != target for source, target in PAIRS)
    for axis in ("world_size", "ep_size", "stage"):
        assert sum(getattr(s, axis) != getattr(t, axis) for s, t in PAIRS) >= 6


@pytest.mark.distributed
def test_weights_moments_and_steps_are_loaded_bit_for_bit(results):
    assert len(results) == len(PAIRS)
    assert {pair: problems for pair, (problems, _) in results.items() if problems} == {}


@pytest.mark.distributed
def test_training_goes_on_as_one_dense_process(results):
    dense = dense_run()
    for pair, (_, run) in results.items():
        assert run.losses == pytest.approx(dense.losses[SAVED_AT:], rel=1e-5), pair
        assert run.norms == pytest.approx(dense.norms[SAVED_AT:], rel=1e-5), pair
    assert STEPS - SAVED_AT >= 2


@pytest.mark.distributed
def test_differences_are_seen(folder, tmp_path):
    """The comparison itself can fail."""
    cell = next(cell for cell in CELLS if cell.layout == (2, 2))
    copy = tmp_path / "checkpoint-1"
    (copy / "training_state").mkdir(parents=True)
    for path in (checkpoint_of(folder, cell) / "training_state").iterdir():
        (copy / "training_state" / path.name).write_bytes(path.read_bytes())
    one = TrainingState(checkpoint_of(folder, cell))
    assert differences(one, TrainingState(copy)) == []
    shard = next((copy / "training_state").glob("shard-00001*"))
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("exp_avg"))
    tensors[name][0] += 1e-6
    save_file(tensors, shard)
    assert len(differences(one, TrainingState(copy))) == 1
