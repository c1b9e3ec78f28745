"""Messages between this rank and each other one of its group, through memory that both have mapped (csrc/mailbox.c).

A sender copies its message in and goes on, a receiver copies it out when it asks for it: nobody works for an exchange
meanwhile. What is too long for the two slots of a mailbox follows in pieces, while the sender waits for what it is to
receive. Who waits for a rank that has ended, or longer than the group's timeout, gets an error, as from a backend. So
does who goes on after an exchange that was broken off.
"""

from __future__ import annotations

import ctypes
import functools
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ldmole_ds.ops import c_library

SOURCE = Path(__file__).with_name("csrc") / "mailbox.c"
HEADER_BYTES, SLOTS = 4096, 2  # as there
_DONE, _NOT_YET = 0, 1
# Of waiting in one go: until a look at whether the other process lives, or at whether a slot is free for more.
_WAIT_NS, _SHORT_WAIT_NS = 50_000_000, 200_000


@functools.cache
def functions() -> tuple[Callable[..., int], Callable[..., int]]:
    """``mailbox_put`` and ``mailbox_take``.

    Raises:
        NoCompilerError: They cannot be built here.
    """
    library = c_library.load((SOURCE,))
    for function in (library.mailbox_put, library.mailbox_take):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 5]
    return library.mailbox_put, library.mailbox_take


@dataclass(frozen=True)
class Peer:
    """Another rank of the group.

    Attributes:
        rank: Its global index, named in errors.
        process: A file descriptor of its process (``pidfd``), readable once that has ended.
        outbox, inbox: Addresses of the mailboxes to it and from it.
        slot_bytes: Of each slot.
    """

    rank: int
    process: int
    outbox: int
    inbox: int
    slot_bytes: int

    def has_ended(self) -> bool:
        """Whether it will never put or take anything again."""
        poll = select.poll()
        poll.register(self.process, select.POLLIN)
        return bool(poll.poll(0))


class _Transfer:
    """A message in one direction, piece by piece; an empty one is a piece, too."""

    def __init__(self, peer: Peer, message: Tensor, exchange: int, *, outwards: bool) -> None:
        self.peer, self.outwards, self.done = peer, outwards, False
        self._message = message  # kept alive
        self._function, self._box = functions()[not outwards], peer.outbox if outwards else peer.inbox
        self._label = exchange, message.nbytes
        self._address, self._left = message.data_ptr(), message.nbytes

    def advance(self, wait_ns: int = 0) -> bool:
        """Copy the next piece in or out, if that is possible within this time; returns whether it was."""
        num_bytes = min(self._left, self.peer.slot_bytes)
        arguments = (self._address, *self._label, num_bytes, self.peer.slot_bytes, wait_ns)
        result = self._function(self._box, *arguments)
        if result == _NOT_YET:
            return False
        if result != _DONE:
            raise RuntimeError(f"rank {self.peer.rank} is in another exchange: its message is not the one expected")
        self._address, self._left = self._address + num_bytes, self._left - num_bytes
        self.done = not self._left
        return True


@dataclass(eq=False)
class Delivery:
    """An exchange under way. Keeps what it reads and writes alive."""

    mailboxes: Mailboxes
    pending: list[_Transfer]

    def wait(self) -> None:
        """Until everything has left and arrived.

        Raises:
            RuntimeError: A rank has ended, keeps this one waiting for too long, or sends another message.
        """
        with self.mailboxes.whole_or_broken():
            self.complete()

    def complete(self) -> None:
        """`wait`, for who has the mailboxes to himself."""
        begin, waited = time.monotonic(), False
        while self.pending:
            # Who has ended is looked at first: what it did before must not be missed.
            ended = next((t.peer for t in self.pending if t.peer.has_ended()), None) if waited else None
            moved = self._advance(self.pending)
            if not moved and ended is not None:
                raise RuntimeError(f"the process of rank {ended.rank} has ended")
            if not moved:
                # As long as there is something to send, others may wait for it.
                short = any(t.outwards for t in self.pending)
                moved = self._advance(self.pending[:1], _SHORT_WAIT_NS if short else _WAIT_NS)
            waited = not moved
            if moved:
                begin = time.monotonic()
            elif time.monotonic() - begin > self.mailboxes.timeout():
                ranks = ", ".join(str(rank) for rank in sorted({t.peer.rank for t in self.pending}))
                raise RuntimeError(f"nothing came from rank {ranks} for {self.mailboxes.timeout():.0f} s")

    def _advance(self, transfers: list[_Transfer], wait_ns: int = 0) -> bool:
        """A piece of each, and whether any moved."""
        moved = [transfer.advance(wait_ns) for transfer in transfers]
        self.pending = [transfer for transfer in self.pending if not transfer.done]
        return any(moved)


@dataclass(eq=False)
class Mailboxes:
    """Of this rank with the others of its group.

    Attributes:
        own_rank: This rank's index in the group.
        peers: The others by their index in the group, None for the own one.
        timeout: Seconds that a rank may keep another waiting.
        memory: Kept alive as long as the addresses of the peers are used.
    """

    own_rank: int
    peers: Sequence[Peer | None]
    timeout: Callable[[], float]
    memory: object = None
    _under_way: Delivery | None = field(default=None, init=False)
    _exchanges: int = field(default=0, init=False)
    _broken_off: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def begin(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> Delivery:
        """Send ``sent[p]`` to each rank p of the group, and have ``received[p]`` filled by the time of `Delivery.wait`.

        Does not wait, except for an exchange that began before and was not waited for.

        Args:
            received, sent: P contiguous CPU tensors each. Any may be empty; the same one may be sent to several ranks.
        """
        if not all(message.is_contiguous() for message in (*received, *sent)):
            raise ValueError("a message must be contiguous")
        with self.whole_or_broken():
            if self._under_way is not None:
                self._under_way.complete()
            number, self._exchanges = self._exchanges, self._exchanges + 1
            outwards = [_Transfer(peer, message, number, outwards=True) for peer, message in self._in_turn(sent)]
            for transfer in outwards:
                while not transfer.done and transfer.advance():
                    pass
            received[self.own_rank].copy_(sent[self.own_rank])
            inwards = [_Transfer(peer, message, number, outwards=False) for peer, message in self._in_turn(received)]
            self._under_way = Delivery(self, [*(t for t in outwards if not t.done), *inwards])
            return self._under_way

    @contextmanager
    def whole_or_broken(self) -> Iterator[None]:
        """One thread at a time; nothing is sent or received after an error or an interrupt in the middle of it."""
        with self._lock:
            if self._broken_off:
                raise RuntimeError("an exchange was broken off before: start the job again")
            self._broken_off = True
            yield
            self._broken_off = False

    def _in_turn(self, messages: Sequence[Tensor]) -> Iterator[tuple[Peer, Tensor]]:
        """From the next rank on: not everyone at the same one."""
        size = len(self.peers)
        for p in ((self.own_rank + i) % size for i in range(1, size)):
            peer = self.peers[p]
            assert peer is not None
            yield peer, messages[p]
