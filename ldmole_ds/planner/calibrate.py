"""The times from which the planner learns the machine at hand; `ldmole_ds.planner.solve` derives speeds and costs.

All ranks are at work at once, as they are in training, so that ranks which share cores or memory are slowed in the same
way. A large product reaches more than the many thin ones of a step do: where the host waits for each operation, a
reference step says how much of it is reached. What a step costs beyond that is what steps of the same model take longer
in DeepSpeed's engine: with replicated experts, with each dispatch, and under ZeRO-3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed import expert_parallel
from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.ops.expert_compute import grouped_margin, grouped_speed
from ldmole_ds.ops.matrix_products import products_for
from ldmole_ds.planner.calibrate_steps import reference_step
from ldmole_ds.planner.layout import Layout
from ldmole_ds.planner.reference import STARTING, THIN, WIDE, Reference, alone
from ldmole_ds.planner.timing import fastest

# Rows, inner size and columns of the product; values of the elementwise sum: what layers of mid-sized models have.
PRODUCT = {"cpu": (512, 1024, 1024), "cuda": (8192, 8192, 8192)}
VALUES = {"cpu": 1 << 24, "cuda": 1 << 27}
_DTYPES = {"float": torch.float32, "half": torch.bfloat16}
EXCHANGED = 1 << 20  # bytes


@dataclass(frozen=True)
class Times:
    """What `measure` found.

    Attributes:
        name, memory, kind: Of the device; ``kind`` is cpu or cuda.
        world_size: Ranks that measured together.
        seconds: By what was timed.
        dispatched: By ep_size, bytes that a rank sent in the dispatches of a reference step.
        grouped_speed, grouped_margin: As of `Device`, with the threads of these ranks.
    """

    name: str
    memory: float
    kind: str
    world_size: int
    seconds: dict[str, float]
    dispatched: dict[int, float]
    grouped_speed: float = 0.0
    grouped_margin: float = 1.0

    def best(self, other: Times) -> Times:
        """The faster of two measurements of the same machine, each time by itself: other work only adds."""
        return replace(self, seconds={name: min(t, other.seconds[name]) for name, t in self.seconds.items()})

    @property
    def ep_sizes(self) -> list[int]:
        """At which exchanges were timed."""
        return sorted(self.dispatched)


def measure(device: torch.device, say: Callable[[str], None] = lambda text: None) -> Times:
    """Take all times. Collective: a process group is up, all ranks measure together.

    Args:
        device: Of this rank.
        say: Called with each stage's name.
    """
    world, kind, seconds = dist.get_world_size(), device.type, {}
    say("products and memory")
    for name, dtype in _DTYPES.items():
        m, k, n = PRODUCT[kind]
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        with torch.no_grad():
            seconds[name] = fastest(lambda a=a, b=b: products_for(a).linear(a, b, None), device)
    x = torch.randn(VALUES[kind], device=device)
    y = torch.empty_like(x)
    seconds["sum"] = fastest(lambda: torch.add(x, x, out=y), device)
    say("steps without communication")
    experts = experts_for(world)
    seconds["starting"] = _plain_step(STARTING, experts, device)
    seconds["thin"] = _plain_step(THIN, experts, device)
    dispatched = {}
    for layout in reference_layouts(world):
        say(f"training steps, {layout_name(layout)}")
        found = reference_step(THIN, experts, layout, device)
        seconds[layout_name(layout)] = found["seconds"]
        if layout.dispatch == "tokens":
            dispatched[layout.ep_size] = found["dispatched"]
    say("training steps, tiny and with a large adapter")
    seconds["starting step"] = reference_step(STARTING, experts, Layout(), device)["seconds"]
    found = reference_step(WIDE, experts, Layout(), device)
    seconds["wide step"], seconds["wide update"] = found["seconds"], found["update"]
    for size in dispatched:
        say(f"the link, groups of {size}")
        for name, num_bytes in (("short", 4 * size), ("long", EXCHANGED)):
            seconds[f"{name} exchange {size}"] = _exchange(size, num_bytes, device)
    memory = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else _host_memory()
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "CPU rank"
    grouped = (grouped_speed(), grouped_margin()) if kind == "cpu" else ()
    return Times(name, memory, kind, world, seconds, dispatched, *grouped)


def experts_for(world_size: int) -> int:
    """Of a reference model: about eight, and a multiple of the ranks."""
    return world_size * max(1, 8 // world_size)


def reference_layouts(world_size: int) -> list[Layout]:
    """In which steps are taken: replicated first."""
    sizes = sorted({2, world_size} if world_size % 2 == 0 else {world_size} - {1})
    stages = [Layout(), Layout(1, 3)] if world_size > 1 else [Layout()]
    return stages + [Layout(size, 2, mode) for size in sizes for mode in ("weights", "tokens")]


def layout_name(layout: Layout) -> str:
    """Of its time."""
    return f"{layout.dispatch}, ep_size {layout.ep_size}, ZeRO-{layout.zero_stage}"


def _plain_step(reference: Reference, num_experts: int, device: torch.device) -> float:
    """Seconds of forward and backward without an engine."""
    model = alone(get_ldmole_model(reference.base(), reference.adapter(num_experts))).to(device).train()
    ids = reference.ids(0).to(device)
    return fastest(lambda: _step(model, ids), device)


def _step(model: LDMoLEModel, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    loss.backward()
    return loss


def _exchange(ep_size: int, num_bytes: int, device: torch.device) -> float:
    """Seconds of an all-to-all in which a rank's whole buffer has so many bytes."""
    collectives = expert_parallel(ep_size).collectives
    data = torch.zeros(num_bytes // 4 // ep_size * ep_size, device=device)
    out = torch.empty_like(data)

    def run() -> Tensor:
        collectives.all_to_all(out, data).wait()
        return out

    return fastest(run, device)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
