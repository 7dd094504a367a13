"""The paper's figures from our results, and three of our own: the Source-Target frontier, loss and CMR over training.

Every function draws into a new matplotlib figure, or returns None if there is nothing to draw. A line goes through the
means over seeds; its bar is the 95 % interval.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, mode
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llava_sculpt.evaluation.figure import COLOURS, MARKERS
from llava_sculpt.experiments.summary import Row
from llava_sculpt.names import METHODS, TRAINED, ZERO_SHOT, task_label
from llava_sculpt.records import write_atomically

# One look for each method in all figures: its colour and marker.
_LOOKS: dict[str, dict[str, Any]] = {
    method: {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    for index, method in enumerate(dict.fromkeys(("sculpt", "lora", "model_tailor", "dora", "dare", *TRAINED)))
}
_SCORES = {"source": {"color": COLOURS[0], "marker": "o"}, "target": {"color": COLOURS[1], "marker": "s"}}
_GREY = "#777777"
_STYLES: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "llava_sculpt",  # the same figure, the same bytes
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_SVG: dict[str, Any] = {"format": "svg", "metadata": {"Date": None, "Creator": None}}


def draw(make: Callable[[], Figure | None]) -> Figure | None:
    """Draw with this module's look, whatever matplotlib is set to elsewhere."""
    with matplotlib.rc_context(_STYLES):
        return make()


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page: no XML head, as wide as there is room, its ids made its own."""
    svg = _saved(figure, **_SVG).decode()
    head, body = re.fullmatch(r".*?<svg([^>]*)>(.*)", svg, re.DOTALL).groups()  # type: ignore[union-attr]
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # Every figure calls its parts axes_1, line2d_3 and so on, and a page may have each id once.
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", body)
    return f'<svg{head} role="img">{body}'


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png and NAME.svg."""
    write_atomically(folder / f"{name}.png", _saved(figure, format="png", dpi=150))
    write_atomically(folder / f"{name}.svg", _saved(figure, **_SVG))


def _saved(figure: Figure, **options: Any) -> bytes:
    stream = io.BytesIO()
    with matplotlib.rc_context(_STYLES):
        figure.savefig(stream, **options)
    return stream.getvalue()


def post_pruning(rows: Sequence[Row]) -> Figure | None:
    """Figure 1: Source and Target of a trained LoRA against the density that pruning leaves."""
    by_density = {row.run.setting("density"): row for row in rows if row.run.method == "post_prune"}
    if not any(row.results for row in by_density.values()):
        return None
    by_density |= {row.run.setting("density") or 1.0: row for row in rows if row.run.method == "lora"}
    figure, panels = _panels(2, (9, 3.8))
    for axes, score in zip(panels, ("source", "target"), strict=True):
        _line(axes, by_density, score, "pruned LoRA (100 %: LoRA)", _LOOKS["lora"])
        _reference(axes, rows, score)
        axes.set_xscale("log")
        _ticks(axes, by_density, "{:g} %", 100)
        axes.set_xlabel("density of lora_A and lora_B after pruning")
        axes.set_ylabel(_score_label(rows, score))
    _legend_below(figure, panels[0])
    return figure


def epochs(rows: Sequence[Row]) -> Figure | None:
    """Figure 3: Target and Source against the number of epochs."""
    trained = [row for row in rows if row.run.seed is not None]
    if not any(row.results for row in trained):
        return None
    figure, panels = _panels(2, (9, 3.8))
    for axes, score in zip(panels, ("target", "source"), strict=True):
        for method in dict.fromkeys(row.run.method for row in trained):
            by_epochs = {row.run.setting("num_train_epochs"): row for row in trained if row.run.method == method}
            _line(axes, by_epochs, score, METHODS[method].label, _LOOKS[method])
        _reference(axes, rows, score)
        axes.set_xlabel("epochs")
        axes.set_ylabel(_score_label(rows, score))
        _ticks(axes, {row.run.setting("num_train_epochs") for row in trained})
    _legend_below(figure, panels[0])
    return figure


def hyper_parameters(rows: Sequence[Row]) -> Figure | None:
    """Figure 4: Source and Target against omega, alpha and s; the dashed lines are plain LoRA."""
    names = {"sculpt_omega": "ω", "sculpt_alpha": "α", "sculpt_density": "density s"}
    sculpt = [row for row in rows if row.run.method == "sculpt"]
    if not any(row.results for row in sculpt):
        return None
    usual = {name: mode(row.run.setting(name) for row in sculpt) for name in names}
    figure, panels = _panels(3, (11, 3.8))
    lora = next((row for row in rows if row.run.method == "lora"), None)
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        others = [other for other in names if other != name]
        varied = {row.run.setting(name): row for row in sculpt if all(row.run.setting(o) == usual[o] for o in others)}
        for score, look in _SCORES.items():
            _line(axes, varied, score, score.title(), look)
            if lora is not None and (value := lora.mean(score)) is not None:
                of_lora = f"{score.title()}, LoRA"
                axes.axhline(value[0], label=of_lora, color=look["color"], linestyle="--", linewidth=1, alpha=0.7)
        axes.set_xscale("log")
        _ticks(axes, varied, *(("{:g} %", 100) if name == "sculpt_density" else ()))
        axes.set_xlabel(label)
    panels[0].set_ylabel(f"score ({task_label(rows[0].task)})")
    _legend_below(figure, panels[0])
    return figure


def layer_densities(rows: Sequence[Row]) -> Figure | None:
    """Figure 5: density of BA for each layer and kind of module, mean over seeds, with the line of Theorem 3.1."""
    shown = [row for row in rows if any("densities" in result for result in row.results.values())]
    if not shown:
        return None
    figure, panels = _panels(len(shown), (4.6 * len(shown) + 1, 4.4), sharey=True)
    for axes, row in zip(panels, shown, strict=True):
        found = [result["densities"] for result in row.results.values() if "densities" in result]
        by_kind: dict[str, dict[int, float]] = {}
        for name in (n for n in found[0]["modules"] if all(n in densities["modules"] for densities in found)):
            match = re.search(r"layers\.(\d+)\.(?:.*\.)?(\w+)$", name)
            if match:
                values = [densities["modules"][name][2] for densities in found]
                by_kind.setdefault(match[2], {})[int(match[1])] = 100 * fmean(values)
        for index, (kind, layers) in enumerate(by_kind.items()):
            look: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "color": COLOURS[index % len(COLOURS)]}
            axes.plot(list(layers), list(layers.values()), markersize=5, linewidth=1.2, label=kind, **look)
        bound = 100 * fmean(densities["total"][3] for densities in found)
        axes.axhline(bound, color=_GREY, linestyle="--", linewidth=1.2, label=f"Theorem 3.1: {bound:.1f} %")
        axes.set_title(f"{task_label(row.task)}, rank {row.run.setting('lora_r')}")
        axes.set_xlabel("layer of the LLM")
        _ticks(axes, {layer for layers in by_kind.values() for layer in layers}, most=16)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("non-zero entries of BA (%)")
    _legend_below(figure, panels[0])
    return figure


def frontier(rows: Sequence[Row]) -> Figure | None:
    """Source against Target of the methods of Table 1; a line joins the ranks, a larger marker is a higher rank."""
    tasks = list(dict.fromkeys(row.task for row in rows if row.results))
    if not tasks:
        return None
    figure, panels = _panels(len(tasks), (4.9 * len(tasks), 4.9))
    for axes, task in zip(panels, tasks, strict=True):
        here = {
            method: [r for r in rows if r.task == task and r.results and r.run.method == method] for method in METHODS
        }
        crosses = []
        for method, look in _LOOKS.items():
            centres = []
            for index, row in enumerate(sorted(here[method], key=lambda row: row.run.setting("lora_r"))):
                (x, x_half), (y, y_half) = row.mean("target") or (0, None), row.mean("source") or (0, None)
                centres.append((x, y))
                crosses.append((x, y, x_half, y_half, look["color"]))
                style: dict[str, Any] = {"markersize": 6 + 2 * index, "markeredgecolor": "white", "linestyle": "none"}
                axes.plot(x, y, zorder=3, **style, **look)
            if centres:
                axes.plot(*zip(*centres, strict=True), color=look["color"], linewidth=1, zorder=2)
                axes.plot([], [], linewidth=1, label=METHODS[method].label, **look)
        for row in here[ZERO_SHOT]:
            (x, _), (y, _) = row.mean("target") or (0, None), row.mean("source") or (0, None)
            axes.plot(x, y, "*", color="black", markersize=11, label=METHODS[ZERO_SHOT].label)
        limits = axes.axis()  # of the points: intervals of two seeds would squeeze them into a corner
        for x, y, x_half, y_half, colour in crosses:
            axes.errorbar(x, y, xerr=x_half, yerr=y_half, color=colour, linewidth=0.7, alpha=0.35, zorder=1)
        axes.axis(limits)
        axes.set_title(task_label(task))
        axes.set_xlabel("Target (learned)")
    panels[0].set_ylabel("Source (kept)")
    _legend_below(figure, panels[0])
    return figure


def training_curves(rows: Sequence[Row]) -> Figure | None:
    """Task loss of LoRA and LoRASculpt over training, and CMR of LoRASculpt; one thin line per seed."""
    shown = [r for r in rows if r.run.method in ("lora", "sculpt") and any("curve" in x for x in r.results.values())]
    if not shown:
        return None
    figure, panels = _panels(2, (9, 3.8))
    titles = {"task_loss": "task loss", "cmr_llm": "CMR of the LLM (mean over matrices)"}
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        for row in shown:
            colour, dashes = _LOOKS[row.run.method]["color"], "-" if row.task == shown[0].task else "--"
            label: str | None = f"{METHODS[row.run.method].label}, {task_label(row.task)}"
            curves = [result.get("curve", {}) for result in row.results.values()]
            for curve in (curve for curve in curves if quantity in curve):
                axes.plot(curve["step"], curve[quantity], dashes, color=colour, linewidth=1, label=label)
                label = None  # named once
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(title)
        axes.set_yscale("log")
        if axes.has_data():
            axes.legend(loc="best")
    return figure


def _panels(number: int, size: tuple[float, float], *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, number, sharey=sharey, squeeze=False)
    return figure, list(axes[0])


def _score_label(rows: Sequence[Row], score: str) -> str:
    return "Source (kept)" if score == "source" else f"{task_label(rows[0].task)} (learned)"


def _legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, where no line or interval can cross it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _line(axes: Axes, rows: dict[Any, Row], score: str, label: str, look: dict[str, Any]) -> None:
    """The means of a score against what the rows are keyed by, with their intervals."""
    points = [(float(x), *value) for x, row in sorted(rows.items()) if (value := row.mean(score)) is not None]
    if not points:
        return
    x, mean, half = (list(column) for column in zip(*points, strict=True))
    axes.plot(x, mean, markersize=6, markeredgecolor="white", label=label, **look)
    # A bar at each point, not a band: a neighbour of a single seed has no interval to shade towards.
    bars = [value or 0.0 for value in half]
    axes.errorbar(x, mean, yerr=bars, fmt="none", ecolor=look["color"], elinewidth=1.5, alpha=0.5, zorder=1)


def _reference(axes: Axes, rows: Sequence[Row], score: str) -> None:
    """Zero-shot as a dotted line."""
    row = next((row for row in rows if row.run.method == ZERO_SHOT), None)
    value = row.mean(score) if row is not None else None
    if value is not None:
        axes.axhline(value[0], color=_GREY, linestyle=":", linewidth=1.2, label=METHODS[ZERO_SHOT].label)


def _ticks(axes: Axes, values: Iterable[float], form: str = "{:g}", unit: float = 1, most: int = 10) -> None:
    """Ticks at the values, in rising order, as far as their labels have room."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or axes.get_xscale() != "log" or value > 1.8 * kept[-1]:
            kept.append(value)
    kept = kept[:: -(-len(kept) // most)]
    axes.set_xticks(kept, [form.format(unit * value) for value in kept])
    axes.minorticks_off()
