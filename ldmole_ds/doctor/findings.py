"""What is wrong with a machine or a job, each with its remedy: pure functions of the facts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ldmole_ds.doctor.machine import RankFacts, StartFacts
from ldmole_ds.doctor.support import tested_range, untested

MIN_SHM, MIN_DISK = 512 << 20, 1 << 30
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


@dataclass(frozen=True)
class Finding:
    """Something to fix: where, what is wrong, what to do about it."""

    where: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}. {self.remedy}"


def before_start(facts: StartFacts) -> list[Finding]:
    """What may keep this host's ranks from starting, or from finding each other."""
    found = [*_missing_interfaces(facts), *_unreachable_name(facts)]
    for path in facts.locks:
        problem = f"{path} was left by a build that was ended midway: every later start that needs it waits without end"
        found.append(Finding(facts.host, problem, f"If no build is running: rm {path}"))
    return found


def _missing_interfaces(facts: StartFacts) -> list[Finding]:
    found = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = facts.variables.get(variable, "")
        exact = variable.startswith("GLOO")  # NCCL takes prefixes, =name, and ^name for all others
        names = [] if value.startswith("^") else [name for name in value.removeprefix("=").split(",") if name]
        known = [any(i == name or i.startswith(name) and not exact for i in facts.interfaces) for name in names]
        if names and not any(known):
            here = ", ".join(facts.interfaces)
            found.append(
                Finding(facts.host, f"{variable}={value} names no interface of this host", f"Set it to one of: {here}")
            )
    return found


def _unreachable_name(facts: StartFacts) -> list[Finding]:
    if "GLOO_SOCKET_IFNAME" in facts.variables or not _several_hosts(facts.variables):
        return []
    if facts.address is not None and not facts.address.startswith("127."):
        return []
    seen = "does not resolve" if facts.address is None else f"resolves to {facts.address}"
    return [
        Finding(
            facts.host,
            f"the host's name {seen}, so that ranks on other hosts cannot reach gloo here",
            "Set GLOO_SOCKET_IFNAME to the interface between the hosts, on every host",
        )
    ]


def _several_hosts(variables: dict[str, str]) -> bool:
    local = next((int(variables[name]) for name in _LOCAL_SIZES if name in variables), None)
    return local is not None and int(variables.get("WORLD_SIZE", "1")) > local


def of_job(ranks: list[RankFacts]) -> list[Finding]:
    """What should be fixed before training, over all ranks; each host speaks once."""
    found = _of_versions(ranks)
    by_host: dict[str, list[RankFacts]] = defaultdict(list)
    for facts in ranks:
        by_host[facts.host].append(facts)
    for host, local in by_host.items():
        found += before_start(local[0].start)
        found += _of_threads(host, local)
        found += _of_space(host, local[0])
        found += _of_settings(host, local[0])
    return found


def _of_versions(ranks: list[RankFacts]) -> list[Finding]:
    first, found = ranks[0].versions, []
    for package in untested(first):
        problem = f"{package} {first[package]} is outside of what was tested ({tested_range(package)})"
        remedy = "Run with --parity; if a cell fails, install a tested version"
        found.append(Finding("versions", problem, remedy))
    for facts in ranks[1:]:
        differing = [name for name in first if facts.versions.get(name) != first[name]]
        if differing:
            pairs = ", ".join(f"{name} {facts.versions.get(name)} (rank 0: {first[name]})" for name in differing)
            found.append(Finding(facts.host, f"rank {facts.rank} has {pairs}", "Install the same on every host"))
    return found


def _of_threads(host: str, local: list[RankFacts]) -> list[Finding]:
    cores, threads = len(set().union(*(facts.cores for facts in local))), sum(facts.threads for facts in local)
    if threads <= cores:
        return []
    fitting = max(1, cores // len(local))
    problem = f"{len(local)} rank(s) run {threads} threads on {cores} cores, which slows all of them"
    if fitting == local[0].threads:
        return [Finding(host, problem, f"Start at most {cores} ranks on this host")]
    return [Finding(host, problem, f"export OMP_NUM_THREADS={fitting}")]


def _of_space(host: str, facts: RankFacts) -> list[Finding]:
    found = []
    if facts.free.get("shm", MIN_SHM) < MIN_SHM:
        problem = f"/dev/shm has {facts.free['shm'] / 2**20:.0f} MiB free: NCCL and data loader workers may fail"
        found.append(Finding(host, problem, "Enlarge it: docker run --shm-size 8g, or mount -o remount,size=8g"))
    for place, flag in (("output", "Give another --output_dir"), ("tmp", "Set TMPDIR to a larger disk")):
        if facts.free[place] < MIN_DISK:
            problem = f"the {place} folder's disk has {facts.free[place] / 2**20:.0f} MiB free"
            found.append(Finding(host, problem, flag))
    return found


def _of_settings(host: str, facts: RankFacts) -> list[Finding]:
    found, variables = [], facts.start.variables
    if "DEEPSPEED_TIMEOUT" in variables:
        problem = f"DEEPSPEED_TIMEOUT={variables['DEEPSPEED_TIMEOUT']} has no effect: training sets its own timeouts"
        found.append(Finding(host, problem, "Use --ddp_timeout SECONDS, which holds for every process group"))
    if facts.start.gpu_driver and facts.device == "cpu":
        cause = "DS_ACCELERATOR=cpu is set" if variables.get("DS_ACCELERATOR") == "cpu" else "torch finds no GPU"
        found.append(
            Finding(
                host,
                f"there is an NVIDIA driver, but training would run on the CPU: {cause}",
                "Unset DS_ACCELERATOR, and install a CUDA build of torch that fits the driver",
            )
        )
    return found
