"""The layouts and settings of the parity matrix."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

# (ranks, ep_size)
LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
# ZeRO stages; "3 zero.Init" builds the frozen base already partitioned.
STAGES = ("1", "2", "3", "3 zero.Init")
DTYPES = ("fp32", "bf16")
# Adapter settings by name, tried in a few layouts each.
ROUTERS = {
    "sparsegen": {},
    "sparsegen, lambda per layer": {"lambda_sharing": "per_layer"},
    "sparsegen_fixed": {"router": "sparsegen_fixed", "fixed_lambda": -0.5},
    "softmax": {"router": "softmax"},
    "topk": {"router": "topk", "topk": 2},
    "topk, 32 experts of rank 16": {"router": "topk", "topk": 2, "num_experts": 32, "r": 16},
    "relu": {"router": "relu", "l1_initial_weight": 1e-2},
    # Three experts stay replicated on two ranks.
    "topk, 3 and 8 experts": {"router": "topk", "topk": 2, "experts_per_layer": [3, 8]},
    "lora": {"router": "lora"},
}
# The other axes; the first value is the plain one.
AXES = {
    "accumulation": (1, 2),
    "checkpointing": (False, True),
    "optimizer": ("client", "config"),
    "offload": (False, True),
    "expert_dispatch": ("tokens", "weights"),
}


@dataclass(frozen=True)
class Cell:
    """One layout with its settings.

    Attributes:
        layout: Ranks and ep_size.
        stage: One of `STAGES`.
        dtype: fp32 or bf16 (engine, base and adapter).
        accumulation: Micro-steps per optimizer step.
        checkpointing: Activation checkpointing.
        optimizer: ``client``, an optimizer object handed to DeepSpeed, as the Trainer does; or ``config``, from the
            DeepSpeed config.
        offload: Optimizer states offloaded to the CPU.
        expert_dispatch: tokens or weights.
        dropout: Of the adapter. Masks differ with the number of ranks, so such cells are compared with ep_size 1 and
            stage 1 on as many ranks.
        router: One of `ROUTERS`.
    """

    layout: tuple[int, int]
    stage: str = "2"
    dtype: str = "fp32"
    accumulation: int = 1
    checkpointing: bool = False
    optimizer: str = "client"
    offload: bool = False
    expert_dispatch: str = "tokens"
    dropout: float = 0.0
    router: str = "sparsegen"

    @property
    def world_size(self) -> int:
        return self.layout[0]

    @property
    def ep_size(self) -> int:
        return self.layout[1]

    @property
    def zero_stage(self) -> int:
        return int(self.stage[0])

    @property
    def needs_counterpart(self) -> bool:
        """Whether the cell is judged beside its `counterpart`, and not by the dense process."""
        return (self.dtype != "fp32" or self.dropout > 0) and self != self.counterpart()

    def counterpart(self) -> Cell:
        """The same with ep_size 1; with dropout also at stage 1."""
        stage = "1" if self.dropout else self.stage
        return replace(self, layout=(self.world_size, 1), stage=stage, expert_dispatch="tokens")

    def __str__(self) -> str:
        extras = [f"accumulation {self.accumulation}"] * (self.accumulation > 1)
        extras += ["checkpointing"] * self.checkpointing + ["optimizer from config"] * (self.optimizer == "config")
        extras += ["offload"] * self.offload + ["weights"] * (self.expert_dispatch == "weights")
        extras += [f"dropout {self.dropout}"] * (self.dropout > 0) + [self.router] * (self.router != "sparsegen")
        plain = f"{self.world_size} ranks, ep {self.ep_size}, ZeRO {self.stage}, {self.dtype}"
        return ", ".join([plain, *extras])


def _valid(cell: Cell) -> bool:
    return cell.ep_size > 1 or cell.expert_dispatch == "tokens"


def _pairs(cell: Cell) -> set[tuple]:
    values = [(f.name, getattr(cell, f.name)) for f in fields(cell) if f.name not in ("dropout", "router")]
    return set(itertools.combinations(values, 2))


def _cover_pairs(candidates: Sequence[Cell], done: Iterable[Cell]) -> list[Cell]:
    """Few of the candidates that, with those done, hold every pair of values of two axes: greedy, always the same."""
    missing = set().union(*map(_pairs, candidates)) - set().union(*map(_pairs, done))
    chosen: list[Cell] = []
    while missing:
        best = max(candidates, key=lambda cell: len(_pairs(cell) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _one_at_a_time() -> list[Cell]:
    """Every axis away from its plain value, alone, at all stages of two partitioned layouts."""
    return [
        replace(Cell(layout, stage), **{axis: values[1]})
        for layout in ((2, 2), (4, 2))
        for stage in STAGES
        for axis, values in AXES.items()
    ]


def full_matrix() -> list[Cell]:
    """Layout x stage x dtype in full; each other axis alone; then what is needed for every pair of values; dropout.

    Cells that another one is compared with are in it.
    """
    plain = [Cell(layout, stage, dtype) for layout in LAYOUTS for stage in STAGES for dtype in DTYPES]
    candidates = [
        replace(cell, **dict(zip(AXES, values, strict=True)))
        for cell in plain
        for values in itertools.product(*AXES.values())
    ]
    cells = [*plain, *_one_at_a_time()]
    cells += _cover_pairs([cell for cell in candidates if _valid(cell)], cells)
    cells += [Cell(layout, stage, dropout=0.1) for layout in LAYOUTS if layout[0] > 1 for stage in STAGES[:3]]
    cells += [Cell((2, 2), stage, router=router) for router in ROUTERS for stage in ("2", "3")]
    return with_counterparts(cells)


def default_cells() -> list[Cell]:
    """The two dozen cells that the tests run."""
    cells = [Cell(layout, stage) for layout in LAYOUTS[1:3] for stage in STAGES]
    cells += [
        Cell((1, 1), "2"),
        Cell((2, 2), "2", expert_dispatch="weights"),
        Cell((2, 2), "1", accumulation=2, checkpointing=True),
        Cell((2, 2), "3", accumulation=2, expert_dispatch="weights"),
        Cell((2, 2), "2", optimizer="config", offload=True),
        Cell((2, 2), "3 zero.Init", checkpointing=True),
        Cell((2, 2), "2", "bf16"),
        Cell((2, 2), "3 zero.Init", "bf16"),
        Cell((2, 2), "2", dropout=0.1),
        Cell((2, 2), "3", dropout=0.1),
        *(Cell((2, 2), "2", router=router) for router in ROUTERS),
        Cell((4, 4), "2"),
        Cell((4, 2), "1"),
        Cell((4, 2), "3", accumulation=2),
        Cell((4, 2), "2", expert_dispatch="weights"),
    ]
    return with_counterparts(cells)


def with_counterparts(cells: list[Cell]) -> list[Cell]:
    """Without repeats, ordered by the number of ranks, and each after the cell it is compared with."""
    wanted = dict.fromkeys(cells) | dict.fromkeys(cell.counterpart() for cell in cells if cell.needs_counterpart)
    return sorted(wanted, key=lambda cell: (cell.world_size, cell.needs_counterpart))
