"""Where the ranks are: which share a host, and which hosts an expert-parallel group touches."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmole_ds.distributed.agreement import everyones
from ldmole_ds.distributed.topology import ExpertParallel

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Longer tables show the first and last ranks.
_MOST_ROWS, _HEAD, _TAIL = 16, 8, 4


@dataclass(frozen=True)
class Place:
    """One rank's place.

    Attributes:
        host: The host's name.
        boot: Tells apart two hosts of the same name.
        local_rank: Rank on the host.
    """

    host: str
    boot: str
    local_rank: int

    @property
    def node(self) -> tuple[str, str]:
        return self.host, self.boot


def gather_places() -> list[Place]:
    """Every rank's place, by rank. Collective."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return everyones(Place(socket.gethostname(), boot, int(os.environ.get("LOCAL_RANK", "0"))))


def fits_in_nodes(ep_size: int, places: Sequence[Place]) -> bool:
    """Whether each EP group, ``ep_size`` consecutive ranks, lies on one host."""
    groups = (places[i : i + ep_size] for i in range(0, len(places), ep_size))
    return all(len({place.node for place in group}) == 1 for group in groups)


def placement_table(places: Sequence[Place], topology: ExpertParallel, num_experts: int) -> str:
    """A row for each rank: node, local rank, rank, the experts it holds; many ranks are abbreviated."""
    nodes = {place.node for place in places}
    summary = f"placement {len(places)} ranks on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    if topology.partitions(num_experts):
        inside = fits_in_nodes(topology.ep_size, places)
        summary += ", EP groups lie inside nodes" if inside else ", EP groups span nodes: tokens cross the network"
        per_rank = num_experts // topology.ep_size
    else:
        per_rank = num_experts
    rows = [("node", "local rank", "rank", "experts")]
    for rank, place in enumerate(places):
        first = rank % topology.ep_size * per_rank if topology.partitions(num_experts) else 0
        held = str(first) if per_rank == 1 else f"{first}-{first + per_rank - 1}"
        rows.append((place.host, str(place.local_rank), str(rank), held))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(places) > _MOST_ROWS:
        lines[1 + _HEAD : -_TAIL] = [f"... {len(places) - _HEAD - _TAIL} more ..."]
    return "\n".join([summary, *(f"          {line}" for line in lines)])
