"""Memory shared by the ranks of an EP group on one machine: they exchange tensors on CPUs through it.

The backend for such tensors (gloo) sends through sockets, also to the process beside it: the kernel copies each message
twice, in small pieces, and threads of its own compete with the products for the cores. Here a message is copied into
memory that the other process has mapped, and out of it. The environment variable ``LDMOLE_SHARED_MEMORY``:

    auto    the default: wherever all ranks of the EP groups can do it, else the backend
    off     always the backend
    on      an error where it cannot be done

It can be done on Linux (from 5.3 on), with a C compiler, between processes of one user, on one machine and in one
network namespace (who separates the networks of two processes means two machines). Each rank makes one anonymous file
in memory with a mailbox for every other rank of its group, which they open through ``/proc``. Of its pages those exist
that were written to: twice the longest messages of a rank, and at most `_RANK_BYTES`. A rank with P - 1 others holds 2
P - 1 file descriptors for them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ldmole_ds.distributed.agreement import everyones
from ldmole_ds.distributed.mailboxes import HEADER_BYTES, SLOTS, Mailboxes, Peer, functions

SWITCH = "LDMOLE_SHARED_MEMORY"
CHOICES = ("auto", "off", "on")
# Of all slots of a rank, and of one slot at most.
_RANK_BYTES, _MOST_SLOT_BYTES = 1 << 28, 1 << 25
# Behind what csrc/mailbox.c keeps in a header: by it a rank knows that it has opened the right file.
_TOKEN_AT, _TOKEN_BYTES = 1024, 16

_opened: weakref.WeakKeyDictionary[dist.ProcessGroup, Opened] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Opened:
    """How the ranks of a group reach each other: ``mailboxes``, or None and the reason."""

    mailboxes: Mailboxes | None
    why_not: str = ""


@dataclass(frozen=True)
class _Offer:
    """What a rank tells the others: how to open its memory, or why there is none."""

    switch: str
    host: str = ""
    process: int = 0
    descriptor: int = -1
    token: bytes = b""
    why_not: str = ""


def open_mailboxes(group: dist.ProcessGroup) -> Opened:
    """Mailboxes between the ranks of this rank's EP group, opened once. Collective over the whole job.

    Raises:
        ValueError: ``LDMOLE_SHARED_MEMORY`` is not one of its values on some rank; raised on all.
        RuntimeError: It is ``on`` for some rank, and cannot be done for some group; raised on all.
    """
    if group not in _opened:
        backend = dist.get_backend(group)
        if backend != "gloo":  # on all ranks alike; for others than tensors on CPUs
            _opened[group] = Opened(None, f"the backend is {backend}")
        else:
            _opened[group] = _open(group)
    return _opened[group]


def _open(group: dist.ProcessGroup) -> Opened:
    ranks = dist.get_process_group_ranks(group)
    with ExitStack() as until_all_have_opened:
        memory, offer = _offer(ranks, until_all_have_opened)
        offers = everyones(offer)
        switches = [o.switch for o in offers]
        for rank, switch in enumerate(switches):
            if switch not in CHOICES:
                raise ValueError(f"{SWITCH}={switch!r} is not known (rank {rank}): use auto, off or on")
        mailboxes, why_not = None, _refusal(offers, ranks)
        if not why_not:
            try:
                mailboxes = _mailboxes(group, ranks, offers, memory)
            except Exception as error:  # whatever it was, the others must hear of it
                why_not = f"rank {dist.get_rank()} cannot open the memory of another one: {error}"
        everyones_reasons = everyones(why_not)
    reason = next((everyones_reasons[rank] for rank in ranks if everyones_reasons[rank]), "")
    failed = next(filter(None, everyones_reasons), "")
    if failed and "on" in switches:
        raise RuntimeError(f"{SWITCH}=on, but {failed}: unset it, then the ranks exchange through the backend")
    return Opened(None, reason) if reason else Opened(mailboxes)


def _offer(ranks: list[int], stack: ExitStack) -> tuple[mmap.mmap | None, _Offer]:
    """This rank's memory, and what it tells the others, who open it before the stack is left."""
    switch = os.environ.get(SWITCH) or "auto"
    if switch == "off":
        return None, _Offer(switch, why_not=f"{SWITCH}=off")
    try:
        functions()
        os.close(os.pidfd_open(os.getpid()))
        descriptor = os.memfd_create("ldmole_ds", os.MFD_CLOEXEC)
        stack.callback(os.close, descriptor)
        box_bytes, token = _box_bytes(len(ranks)), secrets.token_bytes(_TOKEN_BYTES)
        os.ftruncate(descriptor, len(ranks) * box_bytes)
        memory = mmap.mmap(descriptor, len(ranks) * box_bytes)
        for box in range(0, len(memory), box_bytes):
            memory[box + _TOKEN_AT : box + _TOKEN_AT + _TOKEN_BYTES] = token
        host = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/net')}"
    except Exception as error:  # among them AttributeError: of `os`, on another system
        return None, _Offer(switch, why_not=f"rank {dist.get_rank()} has no memory to share: {error}")
    return memory, _Offer(switch, host, os.getpid(), descriptor, token)


def _refusal(offers: Sequence[_Offer], ranks: list[int]) -> str:
    """Why the ranks of a group do not share memory, as far as their offers say; the same on each of them."""
    for rank in ranks:
        if offers[rank].why_not:
            return offers[rank].why_not
    if len({offers[rank].host for rank in ranks}) > 1:
        return f"ranks {ranks[0]} to {ranks[-1]} are not on one machine"
    return ""


def _mailboxes(
    group: dist.ProcessGroup, ranks: list[int], offers: Sequence[_Offer], memory: mmap.mmap | None
) -> Mailboxes:
    assert memory is not None
    own, peers, mapped, box_bytes = dist.get_rank(group), [], [memory], _box_bytes(len(ranks))
    for index, rank in enumerate(ranks):
        if index == own:
            peers.append(None)
            continue
        mapped.append(_open_box(offers[rank], own, box_bytes))
        process = os.pidfd_open(offers[rank].process)
        weakref.finalize(mapped[-1], os.close, process)
        outbox, inbox = _address(memory) + index * box_bytes, _address(mapped[-1])
        peers.append(Peer(rank, process, outbox, inbox, (box_bytes - HEADER_BYTES) // SLOTS))
    backend = group._get_backend(torch.device("cpu"))
    return Mailboxes(own, peers, lambda: backend.options._timeout.total_seconds(), mapped)


def _box_bytes(num_ranks: int) -> int:
    """Of each mailbox in a group of so many ranks, whole pages."""
    slot = min(_RANK_BYTES // (SLOTS * (num_ranks - 1)), _MOST_SLOT_BYTES)
    pages = -(-(HEADER_BYTES + SLOTS * slot) // mmap.ALLOCATIONGRANULARITY)
    return pages * mmap.ALLOCATIONGRANULARITY


def _open_box(offer: _Offer, own: int, box_bytes: int) -> mmap.mmap:
    """The mailbox for this rank in another one's memory."""
    descriptor = os.open(f"/proc/{offer.process}/fd/{offer.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        large_enough = os.fstat(descriptor).st_size >= (own + 1) * box_bytes
        box = mmap.mmap(descriptor, box_bytes, offset=own * box_bytes) if large_enough else None
    finally:
        os.close(descriptor)
    if box is None or box[_TOKEN_AT : _TOKEN_AT + _TOKEN_BYTES] != offer.token:
        raise OSError(f"process {offer.process} is another one here")
    return box


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
