"""A slower wire between ranks on this machine: the loopback of a network namespace of their own, limited by ``tc``.

Needs root and Linux. What the namespace holds goes with the last process in it, so there is nothing to clean up.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from ldmole_ds.distributed.shared_memory import SWITCH

_CLONE_NEWNET = 0x40000000
# A packet of loopback has up to 64 KB. What finds no place waits this long before it is dropped.
_BURST_BYTES, _LONGEST_WAIT = 128 * 1024, "1s"


def enter_own_network() -> None:
    """Move this process, and those that it starts from now on, into a network namespace with nothing but loopback.

    Its ranks share no memory then: what they send must come by the wire.

    Raises:
        OSError: Not allowed.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"no network namespace ({os.strerror(error)}): run as root")
    os.environ[SWITCH] = "off"
    subprocess.run("ip link set lo up".split(), check=True)


@contextmanager
def limited(gbit: float) -> Iterator[None]:
    """Limit what all ranks together send over loopback, in Gbit/s. Only in a network of their own."""
    limit = f"rate {gbit}gbit burst {_BURST_BYTES} latency {_LONGEST_WAIT}"
    subprocess.run(f"tc qdisc add dev lo root tbf {limit}".split(), check=True)
    try:
        yield
    finally:
        subprocess.run("tc qdisc del dev lo root".split(), check=True)
