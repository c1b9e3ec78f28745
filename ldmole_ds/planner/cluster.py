"""The machines: devices by their speeds, nodes, and what a collective costs among some of their ranks.

Speeds of the presets are the vendors' peaks (dense, no sparsity) times what training reaches of them; they are
assumptions until `ldmole_ds.planner.calibrate` has measured the machine at hand.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldmole_ds.distributed.link import Link
from ldmole_ds.planner.costs import StepCosts

# Of the peaks: matrix products, device memory and links.
REACHED = {"products": 0.5, "memory": 0.75, "link": 0.8}


@dataclass(frozen=True)
class Device:
    """One accelerator, or one rank's share of a CPU.

    Attributes:
        name: For reports.
        memory: Bytes.
        half_flops: Operations per second of bfloat16 and float16 products.
        float_flops: The same of float32.
        bandwidth: Bytes per second of its memory.
        op_seconds: What starting an operation costs the host.
        asynchronous: Whether the host starts operations ahead, so that starting and computing overlap.
        grouped_speed: Of grouped expert products beside dense ones; 0 where they are always dense, as on a GPU.
        grouped_margin: As `ldmole_ds.ops.expert_compute.grouped_margin`.
    """

    name: str
    memory: float
    half_flops: float
    float_flops: float
    bandwidth: float
    op_seconds: float = 8e-6
    asynchronous: bool = True
    grouped_speed: float = 0.0
    grouped_margin: float = 1.0


@dataclass(frozen=True)
class Wire:
    """A link between two ranks: ``latency`` seconds per message, ``bandwidth`` bytes per second, rank and direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """``nodes`` machines of ``ranks_per_node`` devices; wires ``inside`` a node and ``between`` nodes."""

    device: Device
    nodes: int
    ranks_per_node: int
    inside: Wire
    between: Wire
    costs: StepCosts = field(default_factory=StepCosts)

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def exchange_link(self, ep_size: int) -> Link:
        """An all-to-all (and the gather that replaces it) among ``ep_size`` consecutive ranks: one message to each.

        Thakur et al. 2005, pairwise exchange: (P - 1) latencies; each byte takes the link its receiver is behind.
        """
        near = min(ep_size, self.ranks_per_node)
        remote = max(ep_size - 1, 1)
        latency = (near - 1) * self.inside.latency + (ep_size - near) * self.between.latency
        far_share = (ep_size - near) / remote
        return Link(latency, 1 / ((1 - far_share) / self.inside.bandwidth + far_share / self.between.bandwidth))

    def ring_link(self, members: int, stride: int) -> Link:
        """A gather or half an all-reduce among ``members`` ranks ``stride`` apart; bytes are those a rank sends.

        Ranks of one node share their wires to the next node's: a ring that visits m ranks of a node has m of them.
        """
        near = min(members, max(self.ranks_per_node // stride, 1))
        hops = math.ceil(math.log2(members)) if members > 1 else 0
        if near == members:
            return Link(hops * self.inside.latency, self.inside.bandwidth)
        return Link(hops * self.between.latency, min(self.inside.bandwidth, near * self.between.bandwidth))


def _preset(
    name: str, gigabytes: float, half: float, single: float, memory: float, link: float, wire: float
) -> dict[str, Any]:
    products, memory_share, link_share = REACHED["products"], REACHED["memory"], REACHED["link"]
    device = Device(
        name, gigabytes * 1e9, half * 1e12 * products, single * 1e12 * products, memory * 1e12 * memory_share
    )
    return {
        "device": device,
        "inside": Wire(3e-6, link * 1e9 * link_share),
        "between": Wire(8e-6, wire * 1e9 * link_share),
    }


# GB; TFLOPS of bfloat16 and float32; TB/s of memory; GB/s per direction inside a node, and per device between nodes.
PRESETS: dict[str, dict[str, Any]] = {
    "h200": _preset("H200 SXM", 141, 989, 67, 4.8, 450, 50),
    "h100": _preset("H100 SXM", 80, 989, 67, 3.35, 450, 50),
    "a100-80gb": _preset("A100 SXM 80 GB", 80, 312, 19.5, 2.04, 300, 25),
    "a100-40gb": _preset("A100 SXM 40 GB", 40, 312, 19.5, 1.56, 300, 25),
    "l40s": _preset("L40S (PCIe 4)", 48, 362, 91.6, 0.864, 32, 12.5),
}


def read_calibration(path: str | Path) -> dict[str, Any]:
    """Device, wires and costs, as `ldmole_ds.planner.calibrate` measured and `write_calibration` wrote them.

    Raises:
        ValueError: Not such a file, or one without the costs of a step.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        device, wire = Device(**values["device"]), Wire(**values["link"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no calibration ({type(error).__name__}: {error}): write one with --calibrate FILE"
        ) from error
    try:
        found = dict(values["costs"])
        sized = {mode: {int(size): cost for size, cost in found.pop(mode).items()} for mode in ("tokens", "weights")}
        costs = StepCosts(**found, **sized)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is a calibration without what a training step costs: write it anew with --calibrate {path}"
        ) from error
    return {"device": device, "inside": wire, "between": wire, "costs": costs}


def write_calibration(path: str | Path, device: Device, link: Wire, costs: StepCosts) -> None:
    """For `read_calibration`."""
    text = json.dumps({"device": asdict(device), "link": asdict(link), "costs": asdict(costs)}, indent=2)
    Path(path).write_text(text + "\n", encoding="utf-8")
