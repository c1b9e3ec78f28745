"""A failed collective of DeepSpeed's or the Trainer's is told from other errors, and its caller is named."""

import os

import pytest
import torch
import torch.distributed as dist

from ldmole_ds.training.lost_peers import lost_peer
from tests.distributed_utils import RankError, run_distributed


def average_norms() -> None:
    dist.all_reduce(torch.ones(1))


def one_rank_leaves(rank: int, world_size: int) -> None:
    average_norms()
    if rank == 1:
        os._exit(3)
    try:
        average_norms()
    except RuntimeError as error:
        raise RuntimeError(f"told: {lost_peer(error)}") from None


@pytest.mark.distributed
def test_the_caller_is_named():
    with pytest.raises(RankError) as caught:
        run_distributed(one_rank_leaves, 2)
    assert (
        "told: rank 0 stopped in phase 'average_norms' of test_lost_peers.py: a peer died or hangs" in f"{caught.value}"
    )


def test_other_errors_are_not_taken_for_it():
    for code in (
        "raise RuntimeError('out of memory')",
        "raise ValueError('no')",
        "import torch; torch.ones(2).view(3)",
    ):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            exec(code)
        assert lost_peer(caught.value) is None
