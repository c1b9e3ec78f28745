#!/usr/bin/env python
"""Where expert parallelism pays off, as the planner sees it: 8 to 1,024 GPUs, 8B and 70B bases, 8 to 1,024 experts.

    python benchmarks/layout_study.py

Writes docs/layout_study.md and its plots. Everything is modelled (`ldmole_ds.planner`); nothing is run on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from ldmole_ds.config import LDMoLEConfig  # noqa: E402
from ldmole_ds.planner import (  # noqa: E402
    PRESETS,
    Batch,
    Cluster,
    Device,
    Estimate,
    Job,
    Layout,
    Precision,
    Routing,
    StepKind,
    StepTrace,
    shape_of_config,
    trace_step,
)

GPUS = [8, 16, 32, 64, 128, 256, 512, 1024]
EXPERTS = [8, 16, 32, 64, 128, 256, 512, 1024]
ACTIVE, SKEW = 2, 4.0
MICRO, LENGTH, NODE, GPU = 4, 1024, 8, "h100"
# Input groups in parts, where tokens travel or ZeRO-3 gathers, and in one node.
KINDS = (StepKind(checkpointing=True), StepKind(checkpointing=True, whole=True))
# Sizes of Llama 3.1 8B and 70B.
_COMMON = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
BASES = {
    "8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_COMMON
    ),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_COMMON
    ),
}
MODES = ("replicate", "weights", "tokens")
COLOURS = {"replicate": "#9ecae1", "weights": "#fdd49e", "tokens": "#74c476", "none": "#eeeeee"}


def adapter(num_experts: int) -> LDMoLEConfig:
    """Rank 8 on every projection, held to two experts per token."""
    return LDMoLEConfig(
        num_experts=num_experts,
        lambda_hidden_size=512,
        sparsity_loss_weight=1.0,
        target_num_experts=ACTIVE,
        adapter_dtype="bfloat16",
    )


@dataclass(frozen=True)
class Continued:
    """A step with many experts from two with few: everything in it grows by the same with each expert."""

    few: StepTrace
    more: StepTrace
    times: float

    def seconds(self, device: Device) -> float:
        return self._at(self.few.seconds(device), self.more.seconds(device))

    @property
    def peak(self) -> float:
        return self._at(self.few.peak, self.more.peak)

    def _at(self, few: float, more: float) -> float:
        return few + self.times * (more - few)


def best_of_modes(base: str, num_experts: int, num_gpus: int, skew: float, shape, traces) -> dict[str, Estimate | None]:
    """Per mode, the fastest layout that fits, or None."""
    cluster = Cluster(nodes=num_gpus // NODE, ranks_per_node=NODE, **PRESETS[GPU])
    job = Job(shape, cluster, Batch(MICRO, LENGTH), Precision(base=2, adapter=2), Routing(ACTIVE, skew), traces)
    ep_sizes = [2**i for i in range(11) if 2**i <= min(num_gpus, num_experts)]
    found: dict[str, Estimate | None] = {}
    for mode in MODES:
        sizes = [1] if mode == "replicate" else ep_sizes[1:]
        # A rank of a group of P is at most P times as full as the mean.
        estimates = [
            job.estimate(Layout(p, stage, mode, True))
            for p in sizes
            for stage in (2, 3)
            if mode != "tokens" or p >= skew
        ]
        fitting = [e for e in estimates if job.fits(e)]
        found[mode] = min(fitting, key=lambda e: e.step_seconds) if fitting else None
    return found


def study() -> dict[tuple, dict[str, Estimate | None]]:
    """All cells: base, experts, GPUs, skew."""
    cells = {}
    for base, hf_config in BASES.items():
        traced = {"micro": MICRO, "length": LENGTH, "dtype": torch.bfloat16}
        steps = {kind: [trace_step(hf_config, adapter(e), kind, **traced) for e in (8, 16)] for kind in KINDS}
        for num_experts in EXPERTS:
            shape = shape_of_config(hf_config, adapter(num_experts))
            traces = {kind: Continued(few, more, (num_experts - 8) / 8) for kind, (few, more) in steps.items()}
            for num_gpus, skew in product(GPUS, (1.0, SKEW)):
                cells[base, num_experts, num_gpus, skew] = best_of_modes(
                    base, num_experts, num_gpus, skew, shape, traces
                )
            print(base, num_experts, "done", flush=True)
    return cells


def winner(cell: dict[str, Estimate | None]) -> str:
    """The fastest mode; one that is not 3 % faster than a simpler one does not win."""
    best = "none"
    for mode in MODES:
        estimate = cell[mode]
        if estimate and (best == "none" or estimate.step_seconds < 0.97 * cell[best].step_seconds):
            best = mode
    return best


def label(cell: dict[str, Estimate | None]) -> str:
    """How much faster the winner is than replicated experts, and its ep_size."""
    mode = winner(cell)
    if mode in ("none", "replicate"):
        return "" if mode == "replicate" else "does not\nfit"
    gain = f"{cell['replicate'].step_seconds / cell[mode].step_seconds:.1f}x" if cell["replicate"] else "only way"
    return f"{gain}\nep {cell[mode].layout.ep_size}"


def draw_map(cells: dict, path: Path) -> None:
    """Who wins, by experts and GPUs."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = [*MODES, "none"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), sharex=True, sharey=True)
    for row, base in enumerate(BASES):
        for column, skew in enumerate((1.0, SKEW)):
            axis = axes[row][column]
            grid = [[names.index(winner(cells[base, e, n, skew])) for n in GPUS] for e in EXPERTS]
            axis.imshow(grid, cmap=ListedColormap([COLOURS[n] for n in names]), vmin=0, vmax=3, origin="lower")
            for y, e in enumerate(EXPERTS):
                for x, n in enumerate(GPUS):
                    axis.text(x, y, label(cells[base, e, n, skew]), ha="center", va="center", fontsize=6)
            axis.set_title(f"{base} base, {'balanced' if skew == 1 else f'fullest rank {skew:g} x the mean'}")
            axis.set_xticks(range(len(GPUS)), GPUS)
            axis.set_yticks(range(len(EXPERTS)), EXPERTS)
            axis.set_xlabel("GPUs")
            axis.set_ylabel("experts per projection")
    legend = [Patch(color=COLOURS[n], label={"none": "nothing fits"}.get(n, n)) for n in names]
    figure.legend(handles=legend, loc="lower center", ncols=4, frameon=False)
    figure.suptitle("Fastest way to hold the experts (modelled)")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_times(cells: dict, path: Path, num_gpus: int = 64) -> None:
    """Step time over the number of experts."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for axis, base in zip(axes, BASES, strict=True):
        for mode, colour in zip(MODES, ("#3182bd", "#e6842a", "#31a354"), strict=True):
            for skew, style in ((1.0, "-"), (SKEW, ":")):
                if mode != "tokens" and skew > 1:
                    continue
                points = [(e, cells[base, e, num_gpus, skew][mode]) for e in EXPERTS]
                points = [(e, estimate.step_seconds) for e, estimate in points if estimate]
                name = mode if skew == 1 else f"{mode}, skewed {skew:g} x"
                axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=colour, label=name)
        axis.set(xscale="log", yscale="log", xlabel="experts per projection", ylabel="seconds per step")
        axis.set_xticks(EXPERTS, EXPERTS)
        axis.set_title(f"{base} base, {num_gpus} GPUs, best layout of each kind")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="upper left")
    figure.suptitle("modelled")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def table(cells: dict, num_gpus: int) -> str:
    """Seconds per step of the best layout of each kind."""

    def shown(estimate: Estimate | None) -> str:
        if estimate is None:
            return "does not fit"
        ep = f"ep {estimate.layout.ep_size}, " * (estimate.layout.ep_size > 1)
        return f"{estimate.step_seconds:.2f} s ({ep}ZeRO-{estimate.layout.zero_stage})"

    lines = ["| base | experts | replicate | weights | tokens | tokens, skewed |", "|" + " --- |" * 6]
    for base, e in product(BASES, EXPERTS):
        even, skewed = cells[base, e, num_gpus, 1.0], cells[base, e, num_gpus, SKEW]
        found = [shown(even[mode]) for mode in MODES] + [shown(skewed["tokens"])]
        lines.append(f"| {base} | {e} | {' | '.join(found)} |")
    return "\n".join(lines)


def main() -> None:
    cells = study()
    images = ROOT / "docs" / "images"
    draw_map(cells, images / "layout_study_map.png")
    draw_times(cells, images / "layout_study_time.png")
    template = (ROOT / "docs" / "layout_study.md").read_text(encoding="utf-8")
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    head, rest = template.split(begin)
    text = head + begin + table(cells, 64) + "\n" + end + rest.split(end)[1]
    (ROOT / "docs" / "layout_study.md").write_text(text, encoding="utf-8")
    print(table(cells, 64))


if __name__ == "__main__":
    main()
