"""A link with real delay between ranks on this machine, without netem.

    with delayed_link(ranks=2, milliseconds=1.0) as link:
        run_distributed(fn, 2, link)        # on each rank, first of all: join(link)

Each rank moves into a network namespace of its own, whose only way out is a TUN device. A relay process holds the other
ends: it reads every packet, keeps it for the delay, and writes it into its receiver's device. Needs root and Linux. The
namespaces and devices go with the relay and the ranks.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_DEVICE, _NETWORK, _MTU = "tun0", "10.77.0", 65000
_RECEIVER = slice(16, 20)  # destination address of an IPv4 packet


@dataclass(frozen=True)
class DelayedLink:
    """What a rank needs to `join`: the relay's process, its files of the ranks' namespaces, and where ranks meet."""

    relay: int
    namespaces: tuple[int, ...]
    store: str


@contextmanager
def delayed_link(ranks: int, milliseconds: float) -> Iterator[DelayedLink]:
    """A relay that delays every packet by so many milliseconds each way, while the context lasts.

    Raises:
        OSError: Not allowed, or no /dev/net/tun.
    """
    command = [sys.executable, __file__, str(ranks), str(milliseconds / 1e3)]
    with tempfile.TemporaryDirectory(prefix="delayed_") as folder:
        relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            line = relay.stdout.readline()
            if not line:
                raise OSError(f"the relay did not start (exit code {relay.wait()}): run as root, with /dev/net/tun")
            yield DelayedLink(relay.pid, tuple(map(int, line.split())), str(Path(folder) / "store"))
        finally:
            relay.stdin.close()  # it ends with us, however we end
            relay.wait()


def join(link: DelayedLink, rank: int) -> None:
    """On a rank: leave the process group it was started in, and make a new one over the link. Collective."""
    import torch.distributed as dist

    world_size = dist.get_world_size()
    dist.destroy_process_group()
    with open(f"/proc/{link.relay}/fd/{link.namespaces[rank]}") as namespace:
        _check(ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET))
    os.environ["GLOO_SOCKET_IFNAME"] = _DEVICE
    options = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{link.store}", **options)


def _check(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"network namespace: {os.strerror(error)}")


# ---- the relay ----


def _open_namespace(rank: int) -> tuple[int, int]:
    """Files of a new namespace, and of the other end of its device. This process is in it afterwards."""
    _check(ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET))
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH14x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        "ip link set lo up",
        f"ip address add {_address(rank)}/24 dev {_DEVICE}",
        f"ip link set {_DEVICE} mtu {_MTU} txqueuelen 10000 up",
    ):
        subprocess.run(command.split(), check=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), tun


def _address(rank: int) -> str:
    return f"{_NETWORK}.{rank + 1}"


def _relay(tuns: list[int], delay: float) -> None:
    """Until stdin ends. Packets are due in the order in which they were read."""
    receivers = {bytes(map(int, _address(rank).split("."))): tun for rank, tun in enumerate(tuns)}
    waiting: list[tuple[float, int, bytes, int]] = []
    number = 0
    while True:
        left = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        for source in select.select([0, *tuns], [], [], left)[0]:
            if source == 0:
                return
            packet = os.read(source, _MTU + 100)
            receiver = receivers.get(packet[_RECEIVER])
            if receiver is not None:
                heapq.heappush(waiting, (time.perf_counter() + delay, number, packet, receiver))
                number += 1
        while waiting and waiting[0][0] <= time.perf_counter():
            _, _, packet, receiver = heapq.heappop(waiting)
            os.write(receiver, packet)


if __name__ == "__main__":
    pairs = [_open_namespace(rank) for rank in range(int(sys.argv[1]))]
    print(*(namespace for namespace, _ in pairs), flush=True)
    _relay([tun for _, tun in pairs], float(sys.argv[2]))
