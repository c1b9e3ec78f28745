import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed_utils import RankError, run_distributed

pytestmark = pytest.mark.distributed


def describe_rank(rank, world_size, offset):
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return {
        "rank": rank,
        "pid": os.getpid(),
        "total": total,
        "env": [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")],
        "port": int(os.environ["MASTER_PORT"]),
        "num_threads": torch.get_num_threads(),
    }


def read_deepspeed_state(rank, world_size):
    import deepspeed.comm as ds_comm

    total = torch.ones(1)
    ds_comm.all_reduce(total)
    return ds_comm.is_initialized(), ds_comm.get_rank(), ds_comm.get_world_size(), total.item()


def square_with_grad(rank, world_size, x):
    y = x * x
    return y, x.numpy(force=True)


def raise_on_last_rank(rank, world_size, pid_folder):
    _note_pid(pid_folder, rank)
    if rank == world_size - 1:
        print("a word before the fall")
        raise LookupError(f"planted on rank {rank}")
    dist.barrier()


def die_on_rank_0(rank, world_size):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_rank_1(rank, world_size, pid_folder):
    _note_pid(pid_folder, rank)
    if rank == 1:
        time.sleep(600)


def return_what_cannot_be_pickled(rank, world_size):
    return lambda: rank


def _note_pid(folder, rank):
    (folder / str(rank)).write_text(str(os.getpid()))


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _assert_all_gone(pid_folder, num_ranks):
    pids = [int(path.read_text()) for path in pid_folder.iterdir()]
    assert len(pids) == num_ranks
    assert not any(_is_alive(pid) for pid in pids)


@pytest.mark.parametrize("world_size", [1, 3])
def test_values_come_back_in_rank_order(world_size):
    results = run_distributed(describe_rank, world_size, 10)
    # Sum of rank + 10 over the ranks.
    total = world_size * (world_size - 1) // 2 + 10 * world_size
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert result["total"].item() == total
        assert result["env"] == [str(rank), str(rank), str(world_size), "127.0.0.1"]
        assert result["num_threads"] == 1
        assert not _is_alive(result["pid"])
    assert len(results) == world_size
    assert len({result["port"] for result in results}) == 1


def test_tensors_with_a_graph_come_back():
    x = torch.arange(3.0, requires_grad=True)
    for y, x_array in run_distributed(square_with_grad, 2, x):
        torch.testing.assert_close(y, torch.tensor([0.0, 1.0, 4.0]), check_stride=False)
        assert x_array.tolist() == [0.0, 1.0, 2.0]


def test_deepspeed_comm_is_initialised():
    assert run_distributed(read_deepspeed_state, 2, deepspeed=True) == [(True, 0, 2, 2.0), (True, 1, 2, 2.0)]


def test_a_raising_rank_is_reported(tmp_path):
    with pytest.raises(RankError) as error:
        run_distributed(raise_on_last_rank, 2, tmp_path)
    message = str(error.value)
    assert message.startswith("rank 1 of 2 failed first (exit code 1)")
    assert "LookupError: planted on rank 1" in message
    assert "in raise_on_last_rank" in message
    assert "a word before the fall" in message
    _assert_all_gone(tmp_path, 2)


def test_a_killed_rank_is_reported():
    with pytest.raises(RankError, match=r"rank 0 of 2 failed first \(exit code -9\)"):
        run_distributed(die_on_rank_0, 2)


def test_a_value_that_cannot_be_returned_is_reported():
    with pytest.raises(RankError, match="return_what_cannot_be_pickled"):
        run_distributed(return_what_cannot_be_pickled, 1)


def test_a_hanging_rank_is_killed_in_time(tmp_path):
    start = time.monotonic()
    with pytest.raises(TimeoutError) as error:
        run_distributed(hang_on_rank_1, 2, tmp_path, timeout_s=12)
    assert time.monotonic() - start < 20
    message = str(error.value)
    assert "killed after 12 s; still running: ranks [0, 1] of 2" in message
    assert "hang_on_rank_1" in message
    _assert_all_gone(tmp_path, 2)


def test_an_inner_function_is_refused():
    def inner(rank, world_size):
        pass

    with pytest.raises(ValueError, match="module-level function"):
        run_distributed(inner, 2)
