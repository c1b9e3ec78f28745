"""Two hosts on one machine: network namespaces joined by a cable, each with its sshd, its name and its /etc files.

Needs root and the Debian packages openssh-server, pdsh and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = "/usr/sbin/sshd"
# The cable's end has another name on each host, as network cards of different makes do.
INTERFACES = ("lan0", "fibre7")


def why_not() -> str | None:
    """The reason why there cannot be two hosts here, None if there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    packages = {"ip": "iproute2", "pdsh": "pdsh", SSHD: "openssh-server", "ssh": "openssh-client"}
    missing = [package for tool, package in packages.items() if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install {' '.join(missing)}"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    namespace: str
    interface: str
    address: str

    def command(self, *words: str) -> list[str]:
        """A command line that runs ``words`` on this host."""
        name_and_run = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.namespace, *name_and_run, *words]

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it out."""
        _run("ip", "-n", self.namespace, "link", "set", self.interface, "up" if up else "down")


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def two_hosts(folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[Host, Host]]:
    """Make them; gone again afterwards.

    Args:
        folder: For keys.
        environment: Of every process that ssh starts there, besides PATH.
    """
    tag = os.getpid()
    hosts = tuple(
        Host(name, f"{name}-{tag}", interface, f"10.213.7.{i}")
        for i, (name, interface) in enumerate(zip(("host-a", "host-b"), INTERFACES, strict=True), 1)
    )
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    Path("/run/sshd").mkdir(exist_ok=True)
    daemons = []
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
            _write_etc(host, hosts, key, environment)
        a, b = hosts
        _run("ip", "link", "add", a.interface, "netns", a.namespace, "type", "veth",
             "peer", "name", b.interface, "netns", b.namespace)  # fmt: skip
        for host in hosts:
            _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _run("ip", "-n", host.namespace, "link", "set", interface, "up")
            daemons.append(subprocess.Popen(host.command(SSHD, "-D", "-e"), stderr=subprocess.DEVNULL))
        for host in hosts:
            _wait_for_ssh(a, host)
        yield a, b
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)


def _write_etc(host: Host, hosts: tuple[Host, ...], key: Path, environment: Mapping[str, str]) -> None:
    """Files that `ip netns exec` lays over /etc. The own name means 127.0.1.1, as on Debian."""
    etc = Path("/etc/netns") / host.namespace
    (etc / "ssh").mkdir(parents=True)
    names = "".join(f"{h.address if h != host else '127.0.1.1'} {h.name}\n" for h in hosts)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    (etc / "ssh" / "ssh_config").write_text(
        f"IdentityFile {key}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        "ServerAliveInterval 5\nServerAliveCountMax 2\n"
    )
    path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    variables = " ".join(f'"{name}={value}"' for name, value in {"PATH": path, **environment}.items())
    (etc / "ssh" / "sshd_config").write_text(
        f"HostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        f"PermitRootLogin prohibit-password\nSetEnv {variables}\n"
    )


def _wait_for_ssh(here: Host, there: Host) -> None:
    words = here.command("sh", "-c", f"for i in $(seq 50); do ssh {there.name} true && exit; sleep 0.2; done; exit 1")
    subprocess.run(words, check=True, capture_output=True, timeout=60)
