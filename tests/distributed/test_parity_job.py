"""The contract on a job's own ranks: which cells are chosen, that one bad rank fails them everywhere, the exit code."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ldmole_ds.parity import Cell, Verdict, exit_code, job, job_cells, run_job
from ldmole_ds.parity.compare import check_dense
from ldmole_ds.parity.dense import dense_run
from ldmole_ds.parity.engine import rows_of_ranks
from tests.distributed_utils import run_distributed

WORLD_SIZES = [1, 2, 3, 4, 6, 7, 8, 12, 16, 64]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_number_of_ranks_has_cells(world_size):
    cells = job_cells(world_size)
    assert len(cells) == len(set(cells)) <= 20
    plain = {(c.ep_size, c.stage) for c in cells if c == Cell(c.layout, c.stage)}
    assert {(size, stage) for size in job.ep_sizes(world_size) for stage in "123"} <= plain
    for index, cell in enumerate(cells):
        assert cell.world_size == world_size
        assert world_size % cell.ep_size == 0 and 8 % cell.ep_size == 0
        assert not cell.needs_counterpart or cell.counterpart() in cells[:index]
    assert any(c.dtype == "bf16" for c in cells) and all(c.dtype == "fp32" for c in job_cells(world_size, bf16=False))
    assert len(job_cells(world_size, quick=True)) <= 3


def test_the_widest_layout_is_among_them():
    assert [job.ep_sizes(n) for n in WORLD_SIZES] == [
        [1], [1, 2], [1], [1, 2, 4], [1, 2], [1], [1, 2, 8], [1, 2, 4], [1, 2, 8], [1, 2, 8]
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_rank_goes_without_a_row(world_size):
    rows = rows_of_ranks(world_size)
    assert len(rows) == world_size and min(rows) >= 1 and sum(rows) == max(8, world_size)


def test_the_splits_of_the_matrix_are_uneven():
    assert [rows_of_ranks(n) for n in (1, 2, 4)] == [[8], [5, 3], [3, 1, 2, 2]]


def test_the_dense_reference_of_many_ranks_is_worth_comparing_with():
    check_dense(dense_run(rows=64))


def judged(passed: bool) -> Verdict:
    return Verdict(Cell((2, 2)), "dense", 0.0, 0.0, 0.0, None, passed, 1.0)


def test_one_failed_cell_or_none_at_all_is_exit_code_1():
    assert exit_code([judged(True), judged(True)]) == 0
    assert exit_code([judged(True), judged(False)]) == 1
    assert exit_code([]) == 1


def run_quick_job(rank: int, world_size: int, bad_rank: int | None = None) -> tuple[list[Verdict], int]:
    """The verdicts, and how many were reported. The bad rank's weights are off by 3e-5 in one tensor."""
    train = job.run_cell

    def train_badly(cell: Cell):
        run = train(cell)
        key = next(iter(run.state))
        return replace(run, state={**run.state, key: run.state[key] * (1 + 3e-5)})

    if rank == bad_rank:
        job.run_cell = train_badly
    reported: list[Verdict] = []
    verdicts = run_job(job_cells(world_size, quick=True), reported.append)
    assert reported == verdicts
    return verdicts, exit_code(verdicts)


@pytest.mark.distributed
def test_three_ranks_pass():
    for verdicts, code in run_distributed(run_quick_job, 3, deepspeed=True):
        assert code == 0 and [str(v.cell) for v in verdicts] == ["3 ranks, ep 1, ZeRO 2, fp32"]


@pytest.mark.distributed
def test_one_bad_rank_fails_the_cell_on_all():
    for verdicts, code in run_distributed(run_quick_job, 2, 1, deepspeed=True):
        assert code == 1 and [v.passed for v in verdicts] == [False, False]
        assert all(2e-5 < v.weights < 4e-5 for v in verdicts)
