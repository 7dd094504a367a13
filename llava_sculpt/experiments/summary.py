"""Runs of one setting over all its seeds, their scores, and the choice of a setting on validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from llava_sculpt.experiments.grid import ANY_TASK, Run
from llava_sculpt.experiments.results import mean_and_interval
from llava_sculpt.names import METHODS, ZERO_SHOT

SCORES = ("source", "target", "avg")
# Differ between the tasks' YAMLs, and say nothing of the method.
_BY_TASK = ("data_path", "image_folder", "output_dir")


@dataclass
class Row:
    """A setting (`run`, of any of its seeds) on a task, and its results, by seed."""

    run: Run
    task: str
    results: dict[int | None, dict[str, Any]] = field(default_factory=dict)

    def values(self, score: str) -> dict[int | None, float]:
        """source, target, avg, or a task's own score, by seed."""
        if score in SCORES:
            return {seed: result["scores"][self.task][score] for seed, result in self.results.items()}
        return {seed: result["tasks"][score]["score"] for seed, result in self.results.items()}

    def mean(self, score: str) -> tuple[float, float | None] | None:
        """Mean and half width of the 95 % interval over the seeds; None without a result."""
        values = list(self.values(score).values())
        return mean_and_interval(values) if values else None


def mean_over(rows: Sequence[Row], score: str) -> dict[int | None, float]:
    """Mean of a score over the rows, by seed, for the seeds that all of them have."""
    parts = [row.values(score) for row in rows]
    shared = [seed for seed in parts[0] if all(seed in part for part in parts)] if parts else []
    return {seed: fmean(part[seed] for part in parts) for seed in shared}


def rows_of(runs: Iterable[Run], results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """The settings of a grid in its order. Zero-shot becomes one row for each task that the grid has."""
    runs = list(runs)
    tasks = list(dict.fromkeys(run.task for run in runs if run.task != ANY_TASK))
    rows: dict[tuple[str, Run], Row] = {}
    for run in runs:
        for task in (tasks or run.targets) if run.task == ANY_TASK else [run.task]:
            key = replace(run, seed=None)
            row = rows.setdefault((task, key), Row(run, task))
            if run.name in results:
                row.results[run.seed] = results[run.name]
    return list(rows.values())


def labels_of(rows: Iterable[Row]) -> list[str]:
    """A name for each row: the method, and those of its settings that differ within the rows of that method."""
    rows = list(rows)
    differing: dict[str, list[str]] = {}
    for row in rows:
        same = [dict((*other.run.settings, *other.run.edit)) for other in rows if other.run.method == row.run.method]
        keys = dict.fromkeys(key for settings in same for key in settings if key not in _BY_TASK)
        differing[row.run.method] = [key for key in keys if len({str(settings.get(key)) for settings in same}) > 1]
    return [
        " ".join([METHODS[row.run.method].label, *(_setting(row.run, key) for key in differing[row.run.method])])
        for row in rows
    ]


def _setting(run: Run, key: str) -> str:
    value = run.setting(key)
    return f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"


def choose(rows: Iterable[Row]) -> dict[tuple[str, str], list[tuple[Row, float]]]:
    """(task, method) -> its settings with their relative score, the best first.

    The relative score of a setting is (Source / zero-shot Source + Target / best Target) / 2 of its means over seeds;
    the best Target is the highest mean of any setting on that task. Equal scores: the lower learning rate first.
    Nothing for a task without zero-shot.
    """
    rows = [row for row in rows if row.results]
    found: dict[tuple[str, str], list[tuple[Row, float]]] = {}
    for task in dict.fromkeys(row.task for row in rows):
        here = [row for row in rows if row.task == task]
        zero_shot = next((row for row in here if row.run.method == ZERO_SHOT), None)
        if zero_shot is None:
            continue
        source = fmean(zero_shot.values("source").values())
        target = max(fmean(row.values("target").values()) for row in here)
        for row in here:
            if row is not zero_shot:
                kept = _share(fmean(row.values("source").values()), source)
                learned = _share(fmean(row.values("target").values()), target)
                found.setdefault((task, row.run.method), []).append((row, (kept + learned) / 2))
    for settings in found.values():
        settings.sort(key=lambda item: (-item[1], item[0].run.setting("learning_rate")))
    return found


def _share(value: float, whole: float) -> float:
    return value / whole if whole else 0.0


def format_rows(rows: list[Row]) -> str:
    """One line per setting, task by task in the grid's order: seeds, and each score with its interval."""
    lines: list[str] = []
    for task in dict.fromkeys(row.task for row in rows):
        here = [row for row in rows if row.task == task]
        labels = labels_of(here)
        width = max(len(label) for label in [*labels, task])
        lines += ["", f"{task:<{width}}  seeds        Source          Target             Avg"]
        for label, row in zip(labels, here, strict=True):
            cells = [_cell(row.mean(score)) for score in SCORES]
            lines.append(f"{label:<{width}}  {len(row.results):5}  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _cell(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return f"{'-':>6}" + " " * 8
    mean, half = value
    return f"{mean:6.2f}" + (" " * 8 if half is None else f" ± {half:<5.2f}")


@dataclass
class Choice:
    """What a search on validation chose for a method on a task: its setting, means over seeds and relative scores."""

    task: str
    setting: str
    settings: int
    source: float
    target: float
    score: float
    next_score: float


def choices_of(rows: list[Row]) -> list[Choice]:
    """What `choose` chooses wherever there was a choice, with the settings that differ."""
    labels = {id(row): label for row, label in zip(rows, labels_of(rows), strict=True)}
    found = []
    for (task, _), ranked in choose(rows).items():
        if len(ranked) > 1:
            (best, score), (_, second) = ranked[:2]
            source, target = (fmean(best.values(name).values()) for name in ("source", "target"))
            found.append(Choice(task, labels[id(best)], len(ranked), source, target, score, second))
    return found


def format_choices(choices: list[Choice]) -> str:
    """One line for each; "" if there is none."""
    lines = [
        f"{c.task}: {c.setting}  (relative score {c.score:.4f}, next {c.next_score:.4f}, {c.settings} settings)"
        for c in choices
    ]
    return "\n".join(["chosen by the rule of configs/grids/select.yaml:", *lines]) if lines else ""
