"""What launchers export, under the names that everything else reads."""

from __future__ import annotations

import os

import pytest

from ldmole_ds.training.runtime import discover_ranks

DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


@pytest.mark.parametrize("exported", [DEEPSPEED, TORCHRUN, OPEN_MPI], ids=["deepspeed", "torchrun", "mpirun"])
def test_every_launcher_names_the_ranks_of_a_node(exported, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(exported))
    discover_ranks()
    for name, value in TORCHRUN.items():
        assert os.environ[name] == value


def test_a_single_process_is_left_alone(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert discover_ranks(use_deepspeed=False) == "a single process" and os.environ == {}
