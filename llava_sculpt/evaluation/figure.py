"""Figures of a run: Source (what was kept) against Target (what was learned), and what its forgetting probe saw."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Distinguishable with colour-blind eyes and in print (Okabe and Ito), with the marker as second sign.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
_GREY = "#c8c8c8"


def plot_source_target(
    rows: Sequence[tuple[str, float, float]],
    path: Path,
    *,
    source_name: str = "Source",
    target_name: str = "Target",
    title: str = "",
) -> None:
    """Write `draw_source_target` as a PNG. The file is written aside and renamed."""
    _write(draw_source_target(rows, source_name=source_name, target_name=target_name, title=title), path)


def plot_forgetting(curve: Mapping[str, Sequence[float]], path: Path, *, title: str = "") -> None:
    """Write what a run's forgetting probe has measured as a PNG, aside and renamed: both measures over the steps.

    Args:
        curve: `train.forgetting.forgetting_curve` of the run, not empty.
    """
    figure = Figure(figsize=(7, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("forgetting_kl", "KL(base || tuned) per token, nats", 1),
        ("forgetting_changed", "answers changed, %", 100),
    )
    for index, (axes, (key, label, scale)) in enumerate(zip(figure.subplots(1, 2), panels, strict=True)):
        # Nothing is forgotten before the first step.
        values = [0.0, *(value * scale for value in curve[key])]
        axes.plot([0, *curve["step"]], values, marker=MARKERS[index], color=COLOURS[index])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def draw_source_target(
    rows: Sequence[tuple[str, float, float]],
    *,
    source_name: str = "Source",
    target_name: str = "Target",
    title: str = "",
) -> Figure:
    """One point per (label, source, target), a legend, and lines of equal Avg behind.

    Rows with the same label get the same colour and are named once. Scores are on the paper's scale.
    """
    figure = Figure(figsize=(7, 4.6 + 0.22 * len({row[0] for row in rows})), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _set_limits(axes, rows)
    _draw_equal_avg(axes)
    styles = {label: index for index, label in enumerate(dict.fromkeys(label for label, _, _ in rows))}
    named: set[str] = set()
    for label, source, target in rows:
        index = styles[label]
        axes.plot(
            target,
            source,
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=9,
            markeredgecolor="white",
            linestyle="none",
            label=None if label in named else label,
        )
        named.add(label)
    # Below the plot: names beside the points would cover other points where runs lie close together.
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    axes.set_xlabel(f"{target_name} (learned)")
    axes.set_ylabel(f"{source_name} (kept)")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _set_limits(axes: Axes, rows: Sequence[tuple[str, float, float]]) -> None:
    """Room around the points; at least 10 points of score on each axis; below 0 and above 100 only where scores are."""
    for column, set_limits, margin in ((2, axes.set_xlim, 0.2), (1, axes.set_ylim, 0.15)):
        values = [float(row[column]) for row in rows]
        low, high = min(values), max(values)
        span = max(high - low, 10.0)
        middle = (low + high) / 2
        top = middle + span * (0.5 + margin)
        bottom = middle - span * (0.5 + margin)
        set_limits(max(bottom, -2.0) if low >= 0 else bottom, min(top, 102.0) if high <= 100 else top)


def _draw_equal_avg(axes: Axes) -> None:
    """Grey lines Source + Target = 2 Avg at a round spacing, each with its value."""
    x, y = np.meshgrid(np.linspace(*axes.get_xlim(), 50), np.linspace(*axes.get_ylim(), 50))
    lines = axes.contour(x, y, (x + y) / 2, levels=8, colors=_GREY, linewidths=0.8, zorder=0)
    axes.clabel(lines, fmt="Avg %g", fontsize=7, colors="#8c8c8c")
