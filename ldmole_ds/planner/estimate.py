"""Time and memory of one layout, the layouts worth comparing, and the one to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ldmole_ds.distributed.dispatch_choice import Workload, choose_dispatch
from ldmole_ds.planner.cluster import Cluster
from ldmole_ds.planner.communication import communication
from ldmole_ds.planner.compute import compute_seconds
from ldmole_ds.planner.layout import Batch, Layout, Precision, Routing
from ldmole_ds.planner.memory import Memory, memory_per_rank
from ldmole_ds.planner.model_shape import ModelShape
from ldmole_ds.planner.step_kind import StepKind, kind_of
from ldmole_ds.planner.trace import StepTrace
from ldmole_ds.planner.zero import PhaseCost

# Share of a device's memory that may be planned for: allocators fragment, and libraries need some.
USABLE_MEMORY = 0.92
# Below this difference the simpler layout is recommended.
_WORTH = 0.03
_SIMPLE_FIRST = ("replicate", "weights", "tokens")


@dataclass(frozen=True)
class Estimate:
    """One layout's optimizer step on the slowest rank. No overlap of computing and communication is assumed."""

    layout: Layout
    memory: Memory
    compute_seconds: float
    optimizer_seconds: float
    phases: dict[str, PhaseCost]

    @property
    def communication_seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.optimizer_seconds + self.communication_seconds


@dataclass(frozen=True)
class Job:
    """What is the same for all layouts. ``traces`` has the traced step of each kind that they have."""

    shape: ModelShape
    cluster: Cluster
    batch: Batch
    precision: Precision
    routing: Routing
    traces: Mapping[StepKind, StepTrace]

    def estimate(self, layout: Layout) -> Estimate:
        """Time and memory of this layout."""
        shape, world = self.shape, self.cluster.world_size
        trace = self.traces[kind_of(layout, self.cluster.device, self.precision)]
        compute, optimizer = compute_seconds(
            shape,
            trace,
            layout,
            self.batch,
            world,
            self.cluster.device,
            self.precision,
            self.routing,
            self.cluster.costs,
        )
        return Estimate(
            layout=layout,
            memory=memory_per_rank(shape, layout, self.batch, world, self.precision, self.routing, trace.peak),
            compute_seconds=compute,
            optimizer_seconds=optimizer,
            phases=communication(shape, layout, self.batch, self.cluster, self.precision, self.routing),
        )

    def fits(self, estimate: Estimate) -> bool:
        """As expected; what happens under the worst skew is told beside it."""
        return estimate.memory.total <= USABLE_MEMORY * self.cluster.device.memory

    def crossover(self, ep_size: int) -> float | None:
        """Tokens per rank and micro-step above which ``weights`` is faster than ``tokens``; None where it never is.

        Both are linear in the tokens for all groups together, so two points give the answer.
        """
        at = [self._exchange_seconds(ep_size, tokens) for tokens in (0, 1 << 20)]
        slope = (at[1][0] - at[0][0]) / (1 << 20)
        if slope <= 0:
            return None
        return max(0.0, (at[0][1] - at[0][0]) / slope)

    def _exchange_seconds(self, ep_size: int, tokens: int) -> tuple[float, float]:
        workload = Workload(tokens, self.routing.active_experts, self.batch.accumulation, self.precision.adapter)
        choices = [
            choose_dispatch(
                workload,
                self.cluster.exchange_link(ep_size),
                ep_size=ep_size,
                num_experts=group.num_experts,
                r=self.shape.config.r,
                in_features=group.in_features,
                out_features=group.out_features,
            )
            for group in self.shape.groups
            if self.shape.is_partitioned(group, ep_size)
        ]
        op_seconds, costs = self.cluster.device.op_seconds, self.cluster.costs
        # Of one input group: five exchanges, or a reduction and its share of a gather.
        tokens = 5 * costs.collective(Layout(ep_size, 2, "tokens"), op_seconds)
        weights = (1 + 1 / self.batch.accumulation) * costs.collective(Layout(ep_size, 2, "weights"), op_seconds)
        return sum(c.tokens_seconds + tokens for c in choices), sum(c.weights_seconds + weights for c in choices)


def layouts(
    cluster: Cluster,
    num_experts: int,
    *,
    ep_size: int | None = None,
    dispatch: str | None = None,
    zero_stage: int | None = None,
    checkpointing: bool = False,
    chunk_tokens: int = 0,
) -> list[Layout]:
    """Every layout that can be trained, or those of them that agree with what is given.

    Raises:
        ValueError: What is given cannot be trained on this cluster.
    """
    world = cluster.world_size
    fitting = [p for p in range(1, world + 1) if world % p == 0 and num_experts % p == 0]
    if ep_size is not None and ep_size not in fitting:
        raise ValueError(
            f"--ep_size {ep_size} must divide {world} ranks and {num_experts} experts: use one of {fitting}"
        )
    found = [
        Layout(p, stage, mode, checkpointing, chunk_tokens if mode == "tokens" else 0)
        for p in fitting
        for mode in (("replicate",) if p == 1 else ("weights", "tokens"))
        for stage in (0, 1, 2, 3)
        if (ep_size is None or p == ep_size)
        and (zero_stage is None or stage == zero_stage)
        and (dispatch is None or mode in (dispatch, "replicate"))
        and not (stage == 0 and p > 1)  # DeepSpeed clips wrongly there, and loses experts on save
    ]
    if not found:
        raise ValueError("ZeRO stage 0 does not go with partitioned experts: use --zero_stage 1, 2 or 3")
    return found


def recommend(job: Job, estimates: list[Estimate]) -> tuple[Estimate | None, str]:
    """The layout to take and why, or None and what to change if none fits.

    Among those that fit, the fastest; a simpler one (replicate before weights before tokens, lower ZeRO stages but for
    2, the default, fewer ranks per group) if it is within 3 %.
    """
    limit = USABLE_MEMORY * job.cluster.device.memory
    fitting = [e for e in estimates if job.fits(e)]
    if not fitting:
        near = min(estimates, key=lambda e: e.memory.total)
        return None, (
            f"No layout fits: the smallest, {describe(near.layout)}, needs {near.memory.total / 1e9:.1f} GB of "
            f"{limit / 1e9:.1f} GB per rank, most of it {_largest(near.memory)}. {_remedy(near)}"
        )
    fastest = min(fitting, key=lambda e: e.step_seconds)
    close = [e for e in fitting if e.step_seconds <= (1 + _WORTH) * fastest.step_seconds]
    best = min(close, key=_simplicity)
    return best, _reason(job, best, fitting, estimates)


def describe(layout: Layout) -> str:
    """In a few words."""
    experts = "experts replicated" if layout.ep_size == 1 else f"ep_size {layout.ep_size}, {layout.dispatch}"
    return f"{experts}, ZeRO-{layout.zero_stage}"


def _simplicity(estimate: Estimate) -> tuple:
    layout = estimate.layout
    return (_SIMPLE_FIRST.index(layout.dispatch), (2, 1, 0, 3).index(layout.zero_stage), layout.ep_size)


def _reason(job: Job, best: Estimate, fitting: list[Estimate], estimates: list[Estimate]) -> str:
    parts = [f"{describe(best.layout)}: {best.step_seconds:.3g} s per step, {best.memory.total / 1e9:.1f} GB per rank."]
    for mode in _SIMPLE_FIRST:
        if mode == best.layout.dispatch:
            continue
        others = [e for e in estimates if e.layout.dispatch == mode]
        if not others:
            continue
        allowed = [e for e in others if e in fitting]
        if not allowed:
            least = min(e.memory.total for e in others)
            parts.append(f"{mode} does not fit (at least {least / 1e9:.1f} GB).")
            continue
        other = min(allowed, key=lambda e: e.step_seconds)
        change = 100 * (other.step_seconds / best.step_seconds - 1)
        told = "equally fast" if abs(change) < 1 else f"{abs(change):.0f} % {'slower' if change > 0 else 'faster'}"
        parts.append(f"{mode} (best {describe(other.layout)}) is {told}.")
    if best.memory.worst > USABLE_MEMORY * job.cluster.device.memory:
        parts.append(
            f"If all tokens chose one rank it would need {best.memory.worst / 1e9:.1f} GB: --dispatch_chunk_tokens "
            "bounds that."
        )
    return " ".join(parts)


def _largest(memory: Memory) -> str:
    names = ("base", "adapter", "gradients", "masters", "moments", "gathered", "activations", "dispatch")
    return max(names, key=lambda name: getattr(memory, name))


def _remedy(near: Estimate) -> str:
    largest = _largest(near.memory)
    if largest in ("activations", "dispatch") and not near.layout.checkpointing:
        return "Add --activation_checkpointing, or take fewer rows at once (--per_device_train_batch_size)."
    if largest in ("activations", "dispatch"):
        return "Take fewer rows at once (--per_device_train_batch_size), or shorter ones (--max_length)."
    if largest in ("base", "gathered"):
        return "Quantise the base (--quantization nf4), load it in bfloat16 (--dtype bfloat16), or take more ranks."
    return "Take a smaller adapter (--r, --num_experts, --target_modules), or more ranks."
