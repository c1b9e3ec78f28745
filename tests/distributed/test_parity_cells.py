"""The contract: the layout never changes the training. The whole matrix is `benchmarks/parity_matrix.py`.

Every cell trains five AdamW steps on one global batch, split unevenly over ranks, with clipping active, all auxiliary
losses on, a shared lambda MLP, awake experts and one idle expert, and must equal a single dense process that computes
every expert by einsum and uses no DeepSpeed.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from ldmole_ds.distributed import expert_parallel, shared_memory
from ldmole_ds.ops import grouped_experts, matrix_products
from ldmole_ds.ops.expert_compute import SWITCH
from ldmole_ds.parity import Cell, default_cells, full_matrix, judge, run_cells, verdict_table
from ldmole_ds.parity import dense_run as run_dense
from ldmole_ds.parity.cells import AXES, DTYPES, LAYOUTS, STAGES
from ldmole_ds.parity.compare import check_dense
from ldmole_ds.parity.dense import Run
from tests.distributed_utils import run_distributed

dense_run = functools.cache(run_dense)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_dense_reference_is_worth_comparing_with(accumulation):
    check_dense(dense_run(accumulation))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layout_does_not_change_training(world_size):
    cells = [cell for cell in default_cells() if cell.world_size == world_size]
    per_rank = run_distributed(run_cells, world_size, cells, deepspeed=True, timeout_s=600)
    for runs in per_rank:
        by_cell = dict(zip(cells, runs, strict=True))
        verdicts = [
            judge(cell, run, dense_run(cell.accumulation, cell.router), by_cell.get(cell.counterpart()))
            for cell, run in by_cell.items()
        ]
        assert all(v.passed for v in verdicts), "\n" + verdict_table([v for v in verdicts if not v.passed])
        # Tokens or weights travelled wherever experts are partitioned.
        for cell, run in by_cell.items():
            assert (run.bytes_sent > 0) == (cell.ep_size > 1 and cell.router != "lora"), cell


def assert_as_dense(cells: list[Cell], runs: list[Run]) -> None:
    """Each run is that of one dense process."""
    verdicts = [
        judge(cell, run, dense_run(cell.accumulation, cell.router), None) for cell, run in zip(cells, runs, strict=True)
    ]
    assert all(v.passed for v in verdicts), "\n" + verdict_table([v for v in verdicts if not v.passed])


GROUPED = [
    Cell((2, 2), "1", accumulation=2, checkpointing=True),
    Cell((2, 2), "2", router="topk, 32 experts of rank 16"),
    Cell((2, 2), "3", router="topk, 32 experts of rank 16"),
    Cell((2, 2), "2", expert_dispatch="weights", router="topk, 32 experts of rank 16"),
]


def run_grouped(rank: int, world_size: int) -> tuple[list[Run], int]:
    """The runs with grouped expert products, and how often those were used."""
    calls = []

    def counted(*args):
        calls.append(args)
        return forward(*args)

    forward = grouped_experts.add_experts
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "grouped")
        patch.setattr(grouped_experts, "add_experts", counted)
        return run_cells(rank, world_size, GROUPED), len(calls)


@pytest.mark.distributed
def test_grouped_products_do_not_change_training():
    """Chosen for all ranks; `tests/distributed/test_any_routing.py` mixes ranks."""
    for runs, calls in run_distributed(run_grouped, 2, deepspeed=True, timeout_s=600):
        assert calls
        assert_as_dense(GROUPED, runs)


# Replicated, and with each dispatch.
EVERY_EXCHANGE = [
    Cell((2, 1), "1", accumulation=2),
    Cell((2, 2), "2", checkpointing=True),
    Cell((2, 2), "2", expert_dispatch="weights"),
    Cell((2, 2), "3"),
]


def run_onednn(rank: int, world_size: int) -> tuple[list[Run], int]:
    """The runs with oneDNN's products, and how many those were."""
    calls = []

    def counted(*args):
        calls.append(args)
        return product(*args)

    product = torch.ops.mkldnn._linear_pointwise.default
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(matrix_products.SWITCH, "onednn")
        patch.setattr(torch.ops.mkldnn._linear_pointwise, "default", counted)
        return run_cells(rank, world_size, EVERY_EXCHANGE), len(calls)


@pytest.mark.distributed
@pytest.mark.skipif(not matrix_products.is_here(), reason="this PyTorch has no oneDNN")
def test_another_library_for_the_products_does_not_change_training():
    for runs, calls in run_distributed(run_onednn, 2, deepspeed=True, timeout_s=600):
        assert calls > 1000
        assert_as_dense(EVERY_EXCHANGE, runs)


def run_backend(rank: int, world_size: int) -> tuple[list[Run], bool]:
    """The runs with the backend's exchange, and whether memory was shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(shared_memory.SWITCH, "off")
        return run_cells(rank, world_size, EVERY_EXCHANGE), expert_parallel(2).mailboxes is not None


@pytest.mark.distributed
def test_the_backends_exchange_does_not_change_training():
    """Wherever ranks share memory, the other tests exchange through it."""
    for runs, shared in run_distributed(run_backend, 2, deepspeed=True, timeout_s=600):
        assert not shared
        assert_as_dense(EVERY_EXCHANGE, runs)


def test_a_wrong_run_does_not_pass():
    dense, cell = dense_run(), Cell((2, 2), "2")
    assert judge(cell, dense, dense, None).passed
    _, key, *_ = dense.state  # not the first: a NaN must be noticed behind a good tensor
    tensor = {**dense.state, key: dense.state[key] * (1 + 3e-5)}
    missing = {k: v for k, v in dense.state.items() if k != key}
    for changes in (
        {"losses": [*dense.losses[:-1], dense.losses[-1] * (1 + 3e-5)]},
        {"losses": [*dense.losses[:-1], float("nan")]},
        {"norms": [dense.norms[0] * (1 - 3e-5), *dense.norms[1:]]},
        {"state": tensor},
        {"state": {**dense.state, key: dense.state[key] * float("nan")}},
        {"state": missing},
    ):
        assert not judge(cell, replace(dense, **changes), dense, None).passed, changes


def test_bf16_is_judged_beside_ep_1():
    dense, cell = dense_run(), Cell((2, 2), "2", "bf16")
    torch.manual_seed(0)
    noise = {k: 1e-3 * torch.randn_like(v) for k, v in dense.state.items()}

    def run(scale):
        return replace(dense, state={k: v + scale * noise[k] for k, v in dense.state.items()})

    assert judge(cell, run(1.1), dense, run(1.0)).passed
    assert not judge(cell, run(1.3), dense, run(1.0)).passed
    assert not judge(cell, replace(run(1.0), losses=[v * 1.002 for v in dense.losses]), dense, run(1.0)).passed


def test_the_full_matrix_holds_every_pair_of_values():
    cells = full_matrix()
    assert len(cells) == len(set(cells)) <= 150
    plain = {(c.layout, c.stage, c.dtype) for c in cells}
    assert plain == set(itertools.product(LAYOUTS, STAGES, DTYPES))
    axes = {"layout": LAYOUTS, "stage": STAGES, "dtype": DTYPES, **AXES}
    for (one, ones), (other, others) in itertools.combinations(axes.items(), 2):
        found = {(getattr(c, one), getattr(c, other)) for c in cells}
        wanted = set(itertools.product(ones, others))
        if (one, other) == ("layout", "expert_dispatch"):
            wanted = {(layout, dispatch) for layout, dispatch in wanted if layout[1] > 1 or dispatch == "tokens"}
        assert wanted <= found, (one, other, wanted - found)
    for cell in cells:
        assert not cell.needs_counterpart or cells.index(cell.counterpart()) < cells.index(cell)
