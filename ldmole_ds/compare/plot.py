"""Accuracy against what it costs: a picture for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldmole_ds.compare.methods import BASELINE, METHODS

_INK, _GREY = "#1f2933", "#9aa5b1"
# One colour for each family of methods; a marker for each member.
_COLOURS = {"ld-mole": "#0f766e", "mola": "#b45309", "remole": "#7c3aed", "softmax": "#be185d", BASELINE: "#1d4ed8"}
_MARKERS = "osD^vP"


def plot_methods(methods: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Accuracy by method, and against experts per token and trained parameters.

    The names in the first panel are the legend of the others. Dots are seeds; bars and the band of plain LoRA are
    standard deviations over them.

    Args:
        methods: Figures by name, see `method_figures`.
        title: Of the whole picture.
        path: PNG to write.
    """
    plt, figure, axes = _figure([1.25, 1, 1], height=0.9 + 0.33 * max(len(methods), 8))
    rows, costs = axes[0], axes[1:]
    styles = _styles(methods)
    for place, (name, figures) in enumerate(methods.items()):
        colour, marker, face = styles[name]
        look = {"color": colour, "marker": marker, "markerfacecolor": face, "markeredgewidth": 1.5, "linestyle": "none"}
        seeds = figures["accuracies"]
        below = [place + 0.27] * len(seeds)
        rows.plot(seeds, below, "o", color=colour, alpha=0.55, markersize=3.5, markeredgewidth=0)
        rows.errorbar(figures["accuracy"], place, xerr=_error(figures), markersize=8, capsize=3, elinewidth=1.3, **look)
        for axis, x in zip(costs, (figures["experts_per_token"], figures["trainable"] / 1e6), strict=True):
            line = axis.errorbar(x, figures["accuracy"], yerr=_error(figures), markersize=8, elinewidth=1, **look)
            line[2][0].set_alpha(0.4)
    rows.set_yticks(range(len(methods)), [figures["label"] for figures in methods.values()], fontsize=10)
    for tick, name in zip(rows.get_yticklabels(), methods, strict=True):
        tick.set_color(styles[name][0])
    rows.set_ylim(len(methods) - 0.4, -0.6)
    rows.set_xlabel("test accuracy")
    _baseline_band(rows.axvline, rows.axvspan, methods)
    for axis in costs:
        axis.set_ylabel("test accuracy")
        _baseline_band(axis.axhline, axis.axhspan, methods)
    costs[0].set_xlabel("experts per token")
    costs[1].set_xlabel("trainable parameters, 10⁶")
    costs[1].set_xscale("log")
    costs[1].xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    costs[1].xaxis.set_major_formatter(plt.matplotlib.ticker.FormatStrFormatter("%g"))
    costs[1].xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
    for axis in costs:
        axis.margins(x=0.1)
    _save(plt, figure, title, path)


def plot_sweep(methods: dict[str, dict[str, Any]], setting: str, title: str, path: Path) -> None:
    """Accuracy and experts per token over the values of one setting, beside plain LoRA.

    Args:
        methods: Figures by name; variants have the setting among their ``settings``.
        setting: What was varied.
        title: Of the whole picture.
        path: PNG to write.
    """
    variants = sorted(
        ((f["settings"][setting], f) for name, f in methods.items() if name != BASELINE), key=lambda pair: pair[0]
    )
    plt, figure, axes = _figure([1, 1], height=3.9)
    look = {"color": _COLOURS["ld-mole"], "marker": "o", "markersize": 7, "linewidth": 1.8}
    for place, (_, figures) in enumerate(variants):
        seeds = figures["accuracies"]
        beside = [place + 0.07] * len(seeds)
        axes[0].plot(beside, seeds, "o", color=look["color"], alpha=0.55, markersize=3.5, markeredgewidth=0)
    ticks, errors = range(len(variants)), [_error(f) for _, f in variants]
    axes[0].errorbar(ticks, [f["accuracy"] for _, f in variants], yerr=errors, capsize=3, elinewidth=1.2, **look)
    axes[0].set_ylabel("test accuracy")
    _baseline_band(axes[0].axhline, axes[0].axhspan, methods)
    if BASELINE in methods:
        height = methods[BASELINE]["accuracy"]
        axes[0].annotate(
            "plain LoRA", (1, height), xycoords=("axes fraction", "data"), xytext=(4, -3), textcoords="offset points",
            fontsize=9, color=_COLOURS[BASELINE],
        )  # fmt: skip
    axes[1].plot(ticks, [f["experts_per_token"] for _, f in variants], **look)
    axes[1].set_ylabel("experts per token")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xticks(ticks, [f"{value:g}" for value, _ in variants])
        axis.set_xlabel(setting)
        axis.margins(x=0.1)
    _save(plt, figure, title, path)


def _figure(widths: list[float], height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (4.4 * sum(widths), height)
    figure, axes = plt.subplots(
        1, len(widths), figsize=size, width_ratios=widths, layout="constrained", facecolor="white"
    )
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_GREY)
        axis.tick_params(labelsize=9, color=_GREY, labelcolor=_INK)
        axis.xaxis.label.set_color(_INK)
        axis.yaxis.label.set_color(_INK)
    return plt, figure, axes


def _error(figures: dict[str, Any]) -> float:
    """Standard deviation over seeds; nothing with one seed."""
    return figures["accuracy_spread"] or 0.0


def _baseline_band(line: Any, span: Any, methods: dict[str, dict[str, Any]]) -> None:
    lora = methods.get(BASELINE)
    if lora is None:
        return
    line(lora["accuracy"], color=_COLOURS[BASELINE], linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    low, high = lora["accuracy"] - _error(lora), lora["accuracy"] + _error(lora)
    span(low, high, color=_COLOURS[BASELINE], alpha=0.08, linewidth=0, zorder=0)


def _styles(methods: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and filling by name; the first of a family is filled."""
    styles, members = {}, dict.fromkeys(_COLOURS, 0)
    for name in sorted(methods, key=list(METHODS).index):
        family = next(f for f in _COLOURS if name.startswith(f))
        colour, index = _COLOURS[family], members[family]
        members[family] += 1
        styles[name] = (colour, _MARKERS[index % len(_MARKERS)], colour if index == 0 else "white")
    return styles


def _save(plt: Any, figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=_INK)
    figure.get_layout_engine().set(w_pad=0.13, h_pad=0.1)
    figure.savefig(path, dpi=140, facecolor="white")
    plt.close(figure)
