"""Ranks of one machine exchange through memory: the backend's results, a clear choice, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ldmole_ds.distributed import CommStats, PeerError, expert_parallel, shared_memory
from ldmole_ds.distributed.all_to_all import Channel, all_to_all, exchange_counts
from ldmole_ds.distributed.collectives import Collectives
from ldmole_ds.distributed.link import measure_link
from ldmole_ds.distributed.mailboxes import Mailboxes
from ldmole_ds.distributed.shared_memory import SWITCH, open_mailboxes
from ldmole_ds.ops.c_library import NoCompilerError
from tests.distributed_utils import CAN_SHARE, run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not CAN_SHARE, reason="needs Linux and a C compiler")]
ROUNDS = 12


def splits_of(round_: int, ranks: int, slot_rows: int) -> torch.Tensor:
    """Rows from rank to rank: some none, some ranks nothing at all, some more than both slots hold."""
    generator = torch.Generator().manual_seed(round_)
    rows = torch.randint(0, 4 * slot_rows, (ranks, ranks), generator=generator)
    rows[torch.rand(ranks, ranks, generator=generator) < 0.3] = 0
    if round_ % 3 == 0:
        rows[round_ % ranks] = 0
    return rows


def compare(rank: int, world_size: int, ep_size: int) -> dict[str, int]:
    """Both ways of every collective, bit by bit where nothing is added up."""
    shared_memory._MOST_SLOT_BYTES = 1 << 14
    topology = expert_parallel(ep_size)
    assert topology.mailboxes is not None and expert_parallel(ep_size).mailboxes is topology.mailboxes
    memory, backend = topology.collectives, Collectives(topology.ep_group)
    width, own = 8, topology.ep_rank
    for round_ in range(ROUNDS):
        dtype = (torch.float32, torch.bfloat16, torch.int64)[round_ % 3]
        rows = splits_of(round_, ep_size, 100)
        sent, received = rows[own].tolist(), rows[:, own].tolist()
        x = torch.randn(sum(sent), width, generator=torch.Generator().manual_seed(100 * rank + round_)).to(dtype)
        outs = [torch.full((sum(received), width), -1, dtype=dtype) for _ in range(2)]
        for out, way in zip(outs, (memory, backend), strict=True):
            way.all_to_all(out, x, received, sent).wait()
        assert torch.equal(*outs), round_
        numbers = torch.randn(ep_size * (17 if round_ % 2 else 9000), generator=torch.Generator().manual_seed(rank))
        part = numbers[: len(numbers) // ep_size].clone()
        gathered = [torch.empty_like(numbers) for _ in range(2)]
        sums = [torch.empty_like(part) for _ in range(2)]
        for way, whole, total in zip((memory, backend), gathered, sums, strict=True):
            way.all_gather(whole, part)
            way.reduce_scatter(total, numbers)
        assert torch.equal(*gathered)
        torch.testing.assert_close(*sums)
        equal = [torch.empty_like(numbers) for _ in range(2)]
        for out, way in zip(equal, (memory, backend), strict=True):
            way.all_to_all(out, numbers).wait()
        assert torch.equal(*equal)
    return {"ranks": topology.collectives.size}


@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 2), (3, 3), (4, 2), (4, 4)])
def test_every_collective_gives_what_the_backend_gives(world_size, ep_size):
    assert run_distributed(compare, world_size, ep_size, deepspeed=True) == [{"ranks": ep_size}] * world_size


def through_autograd(rank: int, world_size: int) -> list[torch.Tensor]:
    topology, found = expert_parallel(world_size), []
    for mailboxes in (topology.mailboxes, None):
        channel = Channel(topology.ep_group, CommStats(), "a layer", mailboxes)
        counts = exchange_counts(torch.tensor([[rank, 5], [rank + 1, 7]]), channel)
        x = torch.randn(2 * rank + 1, 3, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        y = all_to_all(x, *(([0, 0], [0, 1]) if rank == 0 else ([1, 3], [0, 3])), channel, "dispatch")
        (y**3).sum().backward()
        assert channel.stats.calls == {"counts": 1, "dispatch": 1, "dispatch_backward": 1}
        found.append([counts, y.detach(), x.grad])
    memory, backend = found
    assert all(map(torch.equal, memory, backend))
    return memory


def test_forward_and_backward():
    (counts, y, _), (other_counts, other_y, grad) = run_distributed(through_autograd, 2)
    assert counts.tolist() == [[0, 5], [1, 5]] and other_counts.tolist() == [[1, 7], [2, 7]]
    assert y.shape == (0, 3) and other_y.shape == (4, 3) and grad.any()


def tell_instead(**changes) -> None:
    """What this rank tells the others of its memory is something else."""
    original = shared_memory._offer

    def offer(*args):
        memory, told = original(*args)
        return memory, replace(told, **changes)

    shared_memory._offer = offer


def choices(rank: int, world_size: int, settings: list[str], hosts: list[str], compiles: bool) -> tuple[bool, str]:
    """Whether memory is shared, or why not; an error's text as the reason."""
    os.environ[SWITCH] = settings[rank]
    if hosts:
        tell_instead(host=hosts[rank])
    if not compiles:

        def fails():
            raise NoCompilerError("there is no C compiler")

        shared_memory.functions = fails
    try:
        topology = expert_parallel(2)
    except (ValueError, RuntimeError) as error:
        return False, f"{type(error).__name__}: {error}"
    x = torch.full((2,), float(topology.ep_rank))
    out = torch.empty_like(x)
    topology.collectives.all_to_all(out, x).wait()
    assert out.tolist() == [0.0, 1.0]
    return topology.mailboxes is not None, open_mailboxes(topology.ep_group).why_not


@pytest.mark.parametrize(
    ("settings", "hosts", "compiles", "expected"),
    [
        (["auto", "on"], [], True, (True, "")),
        (["auto", "off"], [], True, (False, f"{SWITCH}=off")),
        (["on", "off"], [], True, (False, f"RuntimeError: {SWITCH}=on, but {SWITCH}=off: unset it")),
        (["auto", "auto"], ["a", "b"], True, (False, "ranks 0 to 1 are not on one machine")),
        (["auto", "on"], ["a", "b"], True, (False, f"RuntimeError: {SWITCH}=on, but ranks 0 to 1 are not on one")),
        (["auto", "auto"], [], False, (False, "rank 0 has no memory to share: there is no C compiler")),
        (["auto", "maybe"], [], True, (False, f"ValueError: {SWITCH}='maybe' is not known (rank 1): use auto, off")),
    ],
)
def test_all_ranks_choose_alike(settings, hosts, compiles, expected):
    for shared, reason in run_distributed(choices, 2, settings, hosts, compiles):
        assert shared == expected[0] and reason.startswith(expected[1]), reason


def two_groups(rank: int, world_size: int) -> list:
    """Ranks 0 and 1 are on one machine, 2 and 3 are not."""
    return [choices(rank, world_size, ["auto"] * 4, ["a", "a", "b", "c"], True)[0]]


def test_each_group_chooses_for_itself():
    assert run_distributed(two_groups, 4) == [[True], [True], [False], [False]]


def another_process(rank: int, world_size: int, elsewhere: str) -> str:
    """What rank 1 has told of itself leads elsewhere, as between containers."""
    with tempfile.TemporaryFile() as file, open("/dev/zero", "r+b", buffering=0) as device:
        leads_to = {
            "memory": {"token": b"x" * 16},
            "file": {"descriptor": file.fileno()},
            "device": {"descriptor": device.fileno()},
            "nothing": {"process": 1 << 22},
        }
        if rank == 1:
            tell_instead(**leads_to[elsewhere])
        topology = expert_parallel(2)
    assert topology.mailboxes is None
    return open_mailboxes(topology.ep_group).why_not


@pytest.mark.parametrize("elsewhere", ["memory", "file", "device", "nothing"])
def test_a_process_that_is_not_the_one_meant_is_found_out(elsewhere):
    for reason in run_distributed(another_process, 2, elsewhere):
        assert reason.startswith("rank 0 cannot open the memory of another one: ")
        assert ("No such file" if elsewhere == "nothing" else "is another one here") in reason


def without_pidfd(rank: int, world_size: int) -> str:
    """A Python that was built for a system without them, on one rank."""
    if rank == 1:
        del os.pidfd_open
    topology = expert_parallel(2)
    assert topology.mailboxes is None
    return open_mailboxes(topology.ep_group).why_not


def test_a_rank_that_cannot_watch_the_others_is_heard_of():
    for reason in run_distributed(without_pidfd, 2):
        assert reason.startswith("rank 1 has no memory to share: ") and "pidfd_open" in reason


def another_backend(rank: int, world_size: int) -> tuple[bool, str]:
    """No collective takes place, which would need a device of the rank's own."""
    shared_memory.dist.get_backend = lambda group: "nccl"
    shared_memory.everyones = None
    topology = expert_parallel(2)
    return topology.mailboxes is None, open_mailboxes(topology.ep_group).why_not


def test_other_backends_are_left_alone():
    assert run_distributed(another_backend, 2) == [(True, "the backend is nccl")] * 2


def slow_link(rank: int, world_size: int) -> float:
    """The latency that ranks assume when the second group's is a tenth of a second."""
    topology = expert_parallel(2)
    if rank > 1:
        begin = Mailboxes.begin

        def late(*args):
            time.sleep(0.1)
            return begin(*args)

        Mailboxes.begin = late
    return measure_link(topology, torch.device("cpu")).latency


def test_the_slowest_group_decides_for_all():
    latencies = run_distributed(slow_link, 4)
    assert len(set(latencies)) == 1 and latencies[0] > 0.1


def mappings_and_descriptors() -> tuple[int, int, int]:
    """Of shared memory: mappings, files, and processes watched."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    mapped = Path("/proc/self/maps").read_text().count("memfd:ldmole_ds")
    return mapped, sum("memfd:ldmole_ds" in link for link in links), sum("pidfd" in link for link in links)


def left_behind(rank: int, world_size: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """With the group, and without."""
    topology = expert_parallel(2)
    topology.collectives.all_to_all(torch.empty(2), torch.zeros(2)).wait()
    held = mappings_and_descriptors()
    dist.barrier()
    dist.destroy_process_group()
    del topology
    gc.collect()
    return held, mappings_and_descriptors()


def test_nothing_is_left_when_the_group_is_gone():
    for held, after in run_distributed(left_behind, 2):
        assert held == (2, 2, 1) and after == (0, 0, 0)


def leaves_early(rank: int, world_size: int) -> str:
    topology = expert_parallel(2)
    channel = topology.channel(CommStats(step=4), "the last layer")
    exchange_counts(torch.zeros(2, 1, dtype=torch.int64), channel)
    if rank == 1:
        os._exit(0)
    try:
        exchange_counts(torch.zeros(2, 1, dtype=torch.int64), channel)
    except PeerError as error:
        Path(os.environ["SAID_BY_RANK_0"]).write_text(str(error))
    os._exit(0)


def test_who_waits_for_a_rank_that_left_says_where_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("SAID_BY_RANK_0", str(tmp_path / "said"))
    with pytest.raises(FileNotFoundError):  # no rank returns a result
        run_distributed(leaves_early, 2, timeout_s=60)
    said = (tmp_path / "said").read_text()
    assert "rank 0 stopped in phase 'counts' of the last layer, step 4" in said
    assert "(the process of rank 1 has ended)" in said
