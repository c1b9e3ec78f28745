"""Through which network interface this host reaches the others.

Gloo listens on the address that the host's own name resolves to, which on many machines is 127.0.0.1: no other host can
reach that. So where ranks are on several hosts, it is told the interface whose route leads to MASTER_ADDR. Interfaces
have other names on other hosts; each finds its own.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import MutableMapping

_SIOCGIFADDR = 0x8915  # an interface's IPv4 address (netdevice(7))


def interface_addresses() -> dict[str, str]:
    """IPv4 address by interface, of those that have one, loopback included."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def own_address() -> str:
    """An address at which other hosts reach this one: what its name resolves to, else its first interface's."""
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = "127.0.0.1"
    if not named.startswith("127."):
        return named
    outside = [address for address in interface_addresses().values() if not address.startswith("127.")]
    return outside[0] if outside else named


def route_to(host: str) -> str | None:
    """The interface through which ``host`` is reached; None if nothing leads there, or it is this host's loopback."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))  # sends nothing: the kernel only picks the route
            source = sock.getsockname()[0]
    except OSError:
        return None
    return next((name for name, address in interface_addresses().items() if address == source and name != "lo"), None)


def choose_interface(wish: str, master_addr: str, environ: MutableMapping[str, str] | None = None) -> str | None:
    """Tell gloo (and, if the user names one, NCCL) which interface to use.

    Args:
        wish: ``auto``, or names separated by commas, of which each host takes the first that it has.
        master_addr: Rank 0's host.
        environ: Default ``os.environ``. A GLOO_SOCKET_IFNAME in it wins over ``auto``.

    Returns:
        The interface set here, if any.

    Raises:
        ValueError: This host has none of the names.
    """
    environ = os.environ if environ is None else environ
    if wish == "auto":
        if "GLOO_SOCKET_IFNAME" in environ:
            return None
        name = route_to(master_addr)
    else:
        present = [name for _, name in socket.if_nameindex()]
        name = next((name for name in wish.split(",") if name in present), None)
        if name is None:
            raise ValueError(
                f"--network_interface {wish}: {socket.gethostname()} has only {', '.join(present)}; use one of them, "
                "or auto"
            )
        environ["NCCL_SOCKET_IFNAME"] = f"={name}"
    if name:
        environ["GLOO_SOCKET_IFNAME"] = name
    return name
