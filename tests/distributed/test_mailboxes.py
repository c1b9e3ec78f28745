"""Messages through shared memory: two ends of the mailboxes in one process, each in a thread of its own."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from ldmole_ds.distributed.mailboxes import HEADER_BYTES, SLOTS, Mailboxes, Peer, _Transfer, functions
from tests.distributed_utils import CAN_SHARE

pytestmark = pytest.mark.skipif(not CAN_SHARE, reason="needs Linux and a C compiler")
SLOT = 4096


class Ends:
    """Mailboxes of P ranks, all in this process, or said to be in another one."""

    def __init__(self, ranks: int, timeout: float = 20.0, process: int | None = None) -> None:
        box = HEADER_BYTES + SLOTS * SLOT
        self.memory = mmap.mmap(-1, ranks * ranks * box)
        base = self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.processes = [os.pidfd_open(process or os.getpid())]

        def peer(own: int, other: int) -> Peer | None:
            to, of = base + (own * ranks + other) * box, base + (other * ranks + own) * box
            return Peer(10 + other, self.processes[0], to, of, SLOT) if own != other else None

        peers = [[peer(own, other) for other in range(ranks)] for own in range(ranks)]
        self.of = [Mailboxes(own, peers[own], lambda: timeout) for own in range(ranks)]

    def close(self) -> None:
        for process in self.processes:
            os.close(process)


@pytest.fixture
def ends(request):
    made = []

    def make(*args, **kwargs):
        made.append(Ends(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def in_threads(run, ranks: int) -> list:
    results = [None] * ranks

    def of(rank: int) -> None:
        try:
            results[rank] = run(rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=of, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def message(source: int, target: int, number: int) -> torch.Tensor:
    """Of a length from nothing to several times both slots, known to both ends."""
    generator = torch.Generator().manual_seed(source * 10_000 + target * 100 + number)
    longest = (3, SLOT // 8, 5 * SLOT)[number % 3]
    size = int(torch.randint(0, longest, (), generator=generator)) * (number % 5 > 0)
    return torch.randint(0, 1 << 40, (size,), generator=generator)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_everything_arrives_in_order_whatever_its_length(ends, ranks):
    made = ends(ranks)

    def run(rank: int) -> int:
        bytes_sent = 0
        for number in range(60):
            sent = [message(rank, p, number) for p in range(ranks)]
            expected = [message(p, rank, number) for p in range(ranks)]
            received = [torch.full_like(e, -1) for e in expected]
            delivery = made.of[rank].begin(received, sent)
            if number % 7 == rank:
                time.sleep(0.002)
            delivery.wait()
            assert all(map(torch.equal, received, expected)), number
            bytes_sent += sum(s.nbytes for s in sent)
        return bytes_sent

    assert all(sent > 100 * SLOT for sent in in_threads(run, ranks))


def test_who_sends_does_not_wait(ends):
    made, x = ends(2), torch.arange(SLOT // 8)
    received = torch.zeros_like(x)
    begin = time.monotonic()
    made.of[0].begin([torch.empty(0), torch.empty(0)], [torch.empty(0), x])
    assert time.monotonic() - begin < 1.0
    # Its slot holds what was sent, whatever the tensor becomes.
    expected = x.clone()
    x.zero_()
    made.of[1].begin([received, torch.empty(0)], [torch.empty(0), torch.empty(0)]).wait()
    assert torch.equal(received, expected)


def test_an_exchange_not_waited_for_is_over_before_the_next(ends):
    made, xs = ends(2), [torch.arange(3) + 10 * i for i in range(4)]

    def run(rank: int) -> list[torch.Tensor]:
        received = [torch.zeros(2, 3, dtype=torch.int64) for _ in xs]
        deliveries = [made.of[rank].begin(list(out), [x + rank] * 2) for out, x in zip(received, xs, strict=True)]
        for delivery in reversed(deliveries):
            delivery.wait()
        return received

    for received in in_threads(run, 2):
        for out, x in zip(received, xs, strict=True):
            assert torch.equal(out, torch.stack([x, x + 1]))


@pytest.mark.parametrize("sizes", [(5, 4), (0, 1), (1, 0), (3 * SLOT, 2 * SLOT), (2 * SLOT, 3 * SLOT)])
def test_another_size_is_an_error(ends, sizes):
    made, nothing, (sent, expected) = ends(2), torch.empty(0), sizes
    made.of[0].begin([nothing, nothing], [nothing, torch.zeros(sent)])
    with pytest.raises(RuntimeError, match="rank 10 is in another exchange: its message is not the one expected"):
        made.of[1].begin([torch.zeros(expected), nothing], [nothing, nothing]).wait()


def test_another_exchange_is_an_error(ends):
    made, nothing = ends(2), torch.empty(0)
    made.of[0].begin([nothing, nothing], [nothing, torch.zeros(4)])
    made.of[1]._exchanges = 1  # it has left one out
    with pytest.raises(RuntimeError, match="rank 10 is in another exchange"):
        made.of[1].begin([torch.zeros(4), nothing], [nothing, nothing]).wait()


@pytest.mark.parametrize("where", ["send", "receive"])
def test_nothing_goes_on_after_an_interrupt_in_the_middle(ends, monkeypatch, where):
    made, x = ends(2), torch.arange(3)
    advance = _Transfer.advance

    def interrupted(transfer, *args):
        moved = advance(transfer, *args)
        if transfer.outwards == (where == "send"):
            raise KeyboardInterrupt
        return moved

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Transfer, "advance", interrupted)
        made.of[0].begin([x.clone(), x.clone()], [x, x]).wait()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="an exchange was broken off before: start the job again"):
            made.of[0].begin([x.clone(), x.clone()], [x, x])


def test_threads_of_a_rank_take_turns(ends):
    """Two threads on each side: whose message comes first is open, but each comes whole."""
    made, values = ends(2), 3 * SLOT

    def run(thread: int) -> None:
        rank, mailboxes = thread % 2, made.of[thread % 2]
        for _ in range(40):
            sent, received = torch.full((values,), thread), torch.full((values,), -1)
            nothing = torch.empty(0, dtype=torch.int64)
            pair = ([nothing, received], [nothing, sent]) if rank == 0 else ([received, nothing], [sent, nothing])
            mailboxes.begin(*pair).wait()
            assert len(received.unique()) == 1 and received[0] in (1 - rank, 3 - rank)

    in_threads(run, 4)


def test_counters_go_round(ends):
    """2^32 pieces: the words of all mailboxes stand short of it."""
    made, box = ends(2), HEADER_BYTES + SLOTS * SLOT
    for start in range(made.base, made.base + 4 * box, box):
        for word in (0, 64):  # filled, taken: see csrc/mailbox.c
            ctypes.c_uint32.from_address(start + word).value = 2**32 - 3

    def run(rank: int) -> None:
        for number in range(9):
            sent, received = torch.arange(SLOT) + rank + number, torch.zeros(SLOT, dtype=torch.int64)
            own = torch.empty(0)
            pair = ([own, received], [own, sent]) if rank == 0 else ([received, own], [sent, own])
            made.of[rank].begin(*pair).wait()
            assert torch.equal(received, torch.arange(SLOT) + 1 - rank + number)

    in_threads(run, 2)
    assert ctypes.c_uint32.from_address(made.base + box).value < 2**31


def test_who_sleeps_is_woken(ends):
    made, x = ends(2), torch.arange(4)
    put, take = functions()
    peer, waited = made.of[1].peers[0], []

    def sleep() -> None:
        begin = time.monotonic()
        assert take(peer.inbox, x.data_ptr(), 0, x.nbytes, x.nbytes, SLOT, 20_000_000_000) == 0
        waited.append(time.monotonic() - begin)

    thread = threading.Thread(target=sleep)
    thread.start()
    time.sleep(0.5)
    assert put(made.of[0].peers[1].outbox, x.data_ptr(), 0, x.nbytes, x.nbytes, SLOT, 0) == 0
    thread.join(30)
    assert 0.3 < waited[0] < 10, "it has slept until its time was over"


def test_messages_lie_in_one_piece(ends):
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="a message must be contiguous"):
        ends(2).of[0].begin([x, x], [x, x[:, 1]])


def test_a_rank_that_sends_nothing_is_named_in_time(ends):
    made, begin = ends(2, timeout=0.3), time.monotonic()
    with pytest.raises(RuntimeError, match="nothing came from rank 11 for 0 s"):
        made.of[0].begin([torch.zeros(2), torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]).wait()
    assert 0.3 <= time.monotonic() - begin < 5


def test_a_rank_that_takes_nothing_is_named_in_time(ends):
    made, large, nothing = ends(2, timeout=0.3), torch.zeros(SLOT), torch.empty(0)
    made.of[1].begin([nothing, nothing], [nothing, nothing])
    with pytest.raises(RuntimeError, match="nothing came from rank 11 for 0 s"):
        made.of[0].begin([nothing, nothing], [nothing, large]).wait()


def test_a_rank_that_has_ended_is_named_at_once_but_what_it_sent_is_read(ends):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    made, x, nothing = ends(2, timeout=60, process=other.pid), torch.arange(7), torch.empty(0)
    made.of[1].begin([nothing, nothing], [x, nothing])
    other.communicate(b"\n", timeout=30)
    received, begin = torch.zeros_like(x), time.monotonic()
    made.of[0].begin([nothing, received], [nothing, nothing]).wait()
    assert torch.equal(received, x)
    with pytest.raises(RuntimeError, match="the process of rank 11 has ended"):
        made.of[0].begin([nothing, received], [nothing, nothing]).wait()
    assert time.monotonic() - begin < 10
