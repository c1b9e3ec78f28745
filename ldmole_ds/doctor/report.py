"""What the doctor found, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ldmole_ds.doctor.exchange import ExchangeCheck
from ldmole_ds.doctor.findings import Finding, of_job
from ldmole_ds.doctor.link import LinkTime
from ldmole_ds.doctor.machine import RankFacts
from ldmole_ds.doctor.support import TESTED, is_tested, tested_range


@dataclass(frozen=True)
class Report:
    """A job, seen from outside.

    Attributes:
        accelerator: cuda, cpu, ...
        backend: Of the world group: nccl, gloo, ...
        ep_size: Ranks in a group, in the link's and the exchange's measurement.
        ranks: By global rank.
        transport: By what the ranks of a group reach each other: shared memory, or the backend.
        link: Times of the collectives, smallest buffers first.
        exchange: Verdicts of both dispatchers.
    """

    accelerator: str
    backend: str
    ep_size: int
    ranks: list[RankFacts]
    transport: str
    link: list[LinkTime]
    exchange: list[ExchangeCheck]

    @property
    def findings(self) -> list[Finding]:
        """What to fix."""
        remedy = "Do not train on this job: install tested versions, and see with --parity which layouts are wrong"
        failed = [check.dispatch for check in self.exchange if not check.passed]
        return [*of_job(self.ranks), *(Finding("exchange", f"the one of {name} is wrong", remedy) for name in failed)]

    @property
    def passed(self) -> bool:
        """Whether both dispatchers computed what they must."""
        return all(check.passed for check in self.exchange)

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        return {**asdict(self), "findings": [asdict(f) for f in self.findings], "passed": self.passed}

    def __str__(self) -> str:
        sections = [self._versions(), self._ranks(), self._link(), self._exchange(), self._what_to_fix()]
        return "\n\n".join(sections)

    def _versions(self) -> str:
        rows = [["package", "installed", "tested"]]
        for name, version in self.ranks[0].versions.items():
            tested = tested_range(name) if name in TESTED else ""
            rows.append([name, version, tested + ("" if not tested or is_tested(name, version) else "  <- outside")])
        return _table(rows)

    def _ranks(self) -> str:
        hosts = len({facts.host for facts in self.ranks})
        head = f"{len(self.ranks)} rank(s) on {hosts} host(s), accelerator {self.accelerator}, backend {self.backend}"
        rows = [["rank", "host", "device", "threads", "cores", "memory free", "output disk", "tmp disk", "/dev/shm"]]
        for facts in self.ranks:
            space = [_size(facts.free.get(place)) for place in ("output", "tmp", "shm")]
            memory = _size(facts.memory if facts.device_memory is None else facts.device_memory)
            rows.append([facts.rank, facts.host, facts.device, facts.threads, len(facts.cores), memory, *space])
        return f"{head}\n{_table(rows)}"

    def _link(self) -> str:
        names = list(dict.fromkeys(time.collective for time in self.link))
        by_size: dict[int, list[LinkTime]] = {}
        for time in self.link:
            by_size.setdefault(time.num_bytes, []).append(time)
        rows = [["size", *(f"{name} {unit}" for name in names for unit in ("ms", "GB/s"))]]
        for num_bytes, times in by_size.items():
            figures = [(f"{t.seconds * 1e3:.3f}", _rate(t.bandwidth)) for t in times]
            rows.append([_size(num_bytes), *(text for pair in figures for text in pair)])
        exchanges = [time for time in self.link if time.collective == "all-to-all"]
        rate = _rate(max(time.bandwidth for time in exchanges))
        sent = f"bandwidth {rate} GB/s" if self.ep_size > 1 else "nothing is sent to others"
        latency = f"latency {exchanges[0].seconds * 1e6:.0f} us"
        head = f"all-to-all among {self.ep_size} rank(s), {self.transport}: {latency}, {sent}"
        return f"{head}\nmedian times, and what each rank sends to others:\n{_table(rows)}"

    def _exchange(self) -> str:
        rows = [["exchange of", "result", "difference from all experts in one place", "collectives"]]
        for check in self.exchange:
            rows.append([check.dispatch, "pass" if check.passed else "FAIL", f"{check.difference:.1e}", check.calls])
        return _table(rows)

    def _what_to_fix(self) -> str:
        found = [f"  {finding}" for finding in self.findings]
        return "\n".join(["what to fix", *found]) if found else "what to fix: nothing found"


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.3g}" if bandwidth else "-"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "-"
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= step:
            return f"{num_bytes / step:.3g} {unit}" if num_bytes < 1000 * step else f"{num_bytes / step:.0f} {unit}"
    return f"{num_bytes / 1024:.3g} KiB"


def _table(rows: list[list[object]]) -> str:
    """Columns aligned to the left; the first row is the head."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in text)
