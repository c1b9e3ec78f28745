"""Accuracy against what it costs: a picture for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldmole_ds.compare.methods import BASELINE, METHODS

_INK, _GREY = "#1f2933", "#8a94a0"
# One colour for each family of methods.
_COLOURS = {"ld-mole": "#0f766e", "mola": "#b45309", "remole": "#7c3aed", "softmax": "#be185d", BASELINE: "#1d4ed8"}
_MARKERS = "osD^vP"


def plot_methods(methods: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Accuracy against experts per token, trained parameters and operations, one marker with error bars per method.

    Args:
        methods: Figures by name, see `method_figures`.
        title: Of the whole picture.
        path: PNG to write.
    """
    panels = (
        ("experts per token", lambda f: f["experts_per_token"], False),
        ("trainable parameters, 10⁶", lambda f: f["trainable"] / 1e6, True),
        ("operations per token in training, 10⁶", lambda f: f["flops_per_token"] / 1e6, False),
    )
    plt, figure, axes = _figure(len(panels), width=4.3)
    styles = _styles(methods)
    for axis, (label, x_of, log) in zip(axes, panels, strict=True):
        _baseline_band(axis, methods)
        for name, figures in methods.items():
            colour, marker, face = styles[name]
            axis.errorbar(
                x_of(figures), figures["accuracy"], yerr=_error(figures), fmt=marker, color=colour, markersize=8,
                markerfacecolor=face, markeredgewidth=1.6, capsize=3, elinewidth=1.2, label=figures["label"],
            )  # fmt: skip
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(plt.matplotlib.ticker.FormatStrFormatter("%g"))
            axis.xaxis.set_minor_formatter(plt.matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_xlabel(label, fontsize=10)
    axes[0].set_ylabel("test accuracy", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9.5, frameon=False)
    _save(plt, figure, title, path)


def plot_sweep(methods: dict[str, dict[str, Any]], setting: str, title: str, path: Path) -> None:
    """Accuracy and experts per token over the values of one setting, beside plain LoRA.

    Args:
        methods: Figures by name; variants are named ``setting=value``.
        setting: What was varied.
        title: Of the whole picture.
        path: PNG to write.
    """
    variants = [(f["settings"][setting], f) for name, f in methods.items() if name != BASELINE]
    variants.sort(key=lambda pair: pair[0])
    values = [value for value, _ in variants]
    ticks = range(len(values))
    plt, figure, axes = _figure(2, width=4.6)
    _baseline_band(axes[0], methods)
    line = {"marker": "o", "markersize": 7, "linewidth": 1.8, "color": _COLOURS["ld-mole"], "capsize": 3}
    accuracies, errors = [f["accuracy"] for _, f in variants], [_error(f) for _, f in variants]
    axes[0].errorbar(ticks, accuracies, yerr=errors if any(errors) else None, **line)
    axes[0].set_ylabel("test accuracy", fontsize=10)
    axes[1].errorbar(ticks, [f["experts_per_token"] for _, f in variants], **line)
    axes[1].set_ylabel("experts per token", fontsize=10)
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xticks(ticks, [f"{value:g}" for value in values])
        axis.set_xlabel(setting, fontsize=10)
        axis.margins(x=0.08)
    _save(plt, figure, title, path)


def _figure(panels: int, width: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width * panels, 4.0), sharey=panels == 3)
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_GREY)
        axis.tick_params(labelsize=9, colors=_INK)
    return plt, figure, axes


def _error(figures: dict[str, Any]) -> float:
    """Standard deviation over seeds; nothing with one seed."""
    return figures["accuracy_spread"] or 0.0


def _baseline_band(axis: Any, methods: dict[str, dict[str, Any]]) -> None:
    lora = methods.get(BASELINE)
    if lora is None:
        return
    axis.axhline(lora["accuracy"], color=_COLOURS[BASELINE], linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    low, high = lora["accuracy"] - _error(lora), lora["accuracy"] + _error(lora)
    axis.axhspan(low, high, color=_COLOURS[BASELINE], alpha=0.08, linewidth=0, zorder=0)


def _styles(methods: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Colour by family, marker by member; the first of a family is filled."""
    styles, members = {}, dict.fromkeys(_COLOURS, 0)
    for name in sorted(methods, key=lambda n: list(METHODS).index(n) if n in METHODS else 0):
        family = next((f for f in _COLOURS if name.startswith(f)), "ld-mole")
        colour, index = _COLOURS[family], members[family]
        members[family] += 1
        styles[name] = (colour, _MARKERS[index % len(_MARKERS)], colour if index == 0 else "white")
    return styles


def _save(plt: Any, figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, x=0.01, y=0.995, ha="left", fontsize=12.5, fontweight="bold", color=_INK)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=140, bbox_inches="tight", facecolor="white")
    plt.close(figure)
