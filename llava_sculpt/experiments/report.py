"""`llava-sculpt report`: all tables, figures and findings of a scale, gathered from its result files."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from llava_sculpt.errors import UserError
from llava_sculpt.experiments import figures
from llava_sculpt.experiments.claims import judge
from llava_sculpt.experiments.grid import GRIDS, Grid, method_values, read_grid, read_mapping
from llava_sculpt.experiments.pages import PAGES, Missing, Report, ReportFigure, render
from llava_sculpt.experiments.results import read_results, results_folder
from llava_sculpt.experiments.summary import Choice, Row, choices_of, labels_of, rows_of
from llava_sculpt.experiments.tables import make_table, overview
from llava_sculpt.names import TARGETS, task_label
from llava_sculpt.records import write_atomically

TABLE_GRIDS = ("table1", "table2", "table3", "tableI")
FIGURE_GRIDS = ("fig1", "fig3", "fig4", "fig5")
SEARCHES = ("select", "select_edits")


def report(scale: str, out: Path) -> int:
    """Write report.md, report.html and the figures (PNG and SVG) into `out`; returns 0.

    Raises:
        UserError: no results of that scale, or damaged ones.
    """
    found = gather(scale, read_results(scale))
    out.mkdir(parents=True, exist_ok=True)
    for figure in found.figures:
        if figure.drawn is not None:
            figures.save(figure.drawn, out, figure.name)
    for page in PAGES:
        write_atomically(out / page, render(found, page).encode())
    print(f"{out / 'report.html'}, {out / 'report.md'} and the figures beside them")
    for missing in found.missing:
        print(f"missing: {missing.grid}: {missing.wanted - missing.there} of {missing.wanted} runs: {missing.command}")
    return 0


def gather(scale: str, results: Mapping[str, dict[str, Any]]) -> Report:
    """Put the results of a scale into tables, figures and findings.

    Raises:
        UserError: there are none on the test split.
    """
    results, notes = _of_one_origin(results)
    seeds = max(
        (content["run"]["seed"] or 1 for content in results.values() if content["run"]["split"] == "test"), default=0
    )
    if seeds == 0:
        raise UserError(
            f"{results_folder(scale)}: no results on the test split yet; "
            f"run: llava-sculpt experiment table1 --scale {scale}"
        )
    grids = {name: read_grid(name, scale, "test", seeds) for name in (*TABLE_GRIDS, *FIGURE_GRIDS)}
    rows = {name: rows_of(grid.runs, results) for name, grid in grids.items()}
    used = {run.name for grid in grids.values() for run in grid.runs}
    shown = {name: content for name, content in results.items() if name in used}
    return Report(
        scale=scale,
        seeds=seeds,
        runs=len(shown),
        claims=judge(rows),
        tables=[overview(rows["table1"])]
        + [table for name in TABLE_GRIDS for table in make_table(name, grids[name].title, rows[name])],
        figures=_figures(rows),
        choices=_choices(scale, results),
        missing=[
            m for name, grid in grids.items() if (m := _missing(grid, rows[name], results, scale, seeds)) is not None
        ],
        notes=notes,
        facts=_facts(scale, shown),
    )


def _of_one_origin(results: Mapping[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The results that share base model and data with most; numbers of different origin never stand side by side."""
    counts: dict[Any, Counter[str]] = defaultdict(Counter)
    for content in results.values():
        for part, fingerprint in _origin(content).items():
            counts[part][fingerprint] += 1
    usual = {part: counter.most_common(1)[0][0] for part, counter in counts.items()}
    kept = {
        name: content
        for name, content in results.items()
        if all(usual[part] == fingerprint for part, fingerprint in _origin(content).items())
    }
    note = f"{len(results) - len(kept)} results come from another base model or other data and are left out."
    return kept, [note] if len(kept) < len(results) else []


def _origin(content: dict[str, Any]) -> dict[Any, str]:
    """Fingerprints of base model and data, each under what it may be compared with."""
    run, data = content["run"], content["data"]
    return {None: content["base"], **{(run["task" if name == "train" else "split"], name): data[name] for name in data}}


def _figures(rows: Mapping[str, Sequence[Row]]) -> list[ReportFigure]:
    makers: list[tuple[str, str, str, Callable[[], Figure | None]]] = [
        (
            "frontier",
            "Source against Target",
            "Every method of Table 1. A line joins the ranks 16, 32 and 64; the larger marker is the higher rank. "
            "Up and right is better. Thin crosses: 95 % intervals, cut at the frame.",
            partial(figures.frontier, rows["table1"]),
        ),
        (
            "fig1",
            "Figure 1: pruning a trained LoRA",
            "The entries of smallest magnitude of a trained LoRA are set to zero afterwards.",
            partial(figures.post_pruning, rows["fig1"]),
        ),
        (
            "fig3",
            "Figure 3: more epochs",
            "Each point is a training of its own with that many epochs.",
            partial(figures.epochs, rows["fig3"]),
        ),
        (
            "fig4",
            "Figure 4: hyper-parameters of LoRASculpt",
            "One is varied, the others keep their usual value.",
            partial(figures.hyper_parameters, rows["fig4"]),
        ),
        (
            "fig5",
            "Figure 5: density of BA",
            "Measured in the trained adapters; the line is Theorem 3.1 at the measured densities of A and B.",
            partial(figures.layer_densities, rows["fig5"]),
        ),
        (
            "curves",
            "Training curves at rank 32",
            "Left the task loss, right the Conflict Mitigation Regularizer (Eq. 8) as logged; one line per seed.",
            partial(figures.training_curves, [r for r in rows["table1"] if r.run.setting("lora_r") == 32]),
        ),
    ]
    return [ReportFigure(name, title, caption, figures.draw(make)) for name, title, caption, make in makers]


def _choices(scale: str, results: Mapping[str, dict[str, Any]]) -> list[Choice]:
    found: list[Choice] = []
    for name in SEARCHES:
        if scale not in read_mapping(GRIDS / f"{name}.yaml"):
            continue
        seeds = {content["run"]["seed"] for content in results.values() if content["run"]["split"] == "val"} - {None}
        grid = read_grid(name, scale, seeds=max(1, len(seeds)))
        found += choices_of(rows_of(grid.runs, results))
    return found


def _missing(
    grid: Grid, rows: Sequence[Row], results: Mapping[str, dict[str, Any]], scale: str, seeds: int
) -> Missing | None:
    there = sum(run.name in results for run in grid.runs)
    if there == len(grid.runs):
        return None
    names = labels_of(rows)
    settings = [f"{task_label(row.task)}: {name}" for row, name in zip(rows, names, strict=True) if not row.results]
    command = f"llava-sculpt experiment {grid.name} --scale {scale} --seeds {seeds}"
    return Missing(grid.name, there, len(grid.runs), settings, command)


def _facts(scale: str, shown: Mapping[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What a reader needs to judge or repeat the numbers."""
    records = [content["record"] for content in shown.values()]
    hours = sum(sum(record["seconds"].values()) for record in records) / 3600
    versions = Counter(
        ", ".join(
            f"{name} {record['versions'][name]}"
            for name in ("torch", "transformers", "peft")
            if name in record["versions"]
        )
        for record in records
    )
    metrics = {
        task_label(name): f"{task['metric']} ({task['variant']}), N {task['n']}"
        for content in shown.values()
        for name, task in content["tasks"].items()
    }
    chosen = [
        f"{task_label(task)}: {method} {', '.join(f'{key} {value:g}' for key, value in values.items())}"
        for task in TARGETS
        for method, values in method_values(scale, task).items()
    ]
    return [
        ("Base model", ", ".join(sorted({content["base"][:16] for content in shown.values()})) + " (sha256)"),
        ("Scored by", "; ".join(f"{name}: {metric}" for name, metric in sorted(metrics.items()))),
        ("Values beside the YAML files", "; ".join(chosen)),
        ("Compute", f"{hours:.1f} hours over all runs, as they ran (side by side they share the machine)"),
        ("Versions", "; ".join(f"{text} ({number} runs)" for text, number in versions.most_common())),
    ]
