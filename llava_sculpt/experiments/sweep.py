"""Many runs from one grid file: train and score each, side by side, and report means with intervals over seeds.

`llava-sculpt sweep configs/grids/FILE.yaml` runs the public commands `llava-sculpt train` and `llava-sculpt eval`, one
process per run. A finished run is never done again; an unfinished one continues.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from llava_sculpt.benchmarks import SOURCES, TARGETS
from llava_sculpt.config import METHODS
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.figure import plot_source_target
from llava_sculpt.experiments.tiny_data import prepare_tiny_world
from llava_sculpt.records import write_json

_SCORES = ("source", "target", "avg")
_LABELLED = 6  # points of a figure that can carry their settings as labels; with more, the method alone
# Student's t, 97.5 %, for 1 to 9 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Run:
    """One training run of a sweep. `settings` are fields of the training configuration, without the seed."""

    task: str
    method: str
    settings: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def label(self) -> str:
        """Method and settings: what the runs of all seeds share."""
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.settings)])

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.label} seed={self.seed}".replace(" ", "_")


def read_grid(file: Path) -> tuple[list[Run], str]:
    """The runs of a grid file, and the split they are scored on.

    A grid has `task` (iconqa or coco), `split` (val or test) and `runs`: a list of mappings from `method` and fields
    of the training configuration to a value or a list of values; a mapping stands for all combinations.

    Raises:
        UserError: everything that is wrong with the file.
    """
    try:
        grid = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if not isinstance(grid, dict) or set(grid) != {"task", "split", "runs"}:
        raise UserError(f"{file}: needs exactly the keys task, split and runs")
    problems = []
    if grid["task"] not in TARGETS:
        problems.append(f"{file}: task: {grid['task']!r} is not one of {', '.join(TARGETS)}")
    if grid["split"] not in ("val", "test"):
        problems.append(f"{file}: split: {grid['split']!r} is neither val nor test")
    found: dict[Run, None] = {}
    for number, entry in enumerate(grid["runs"] if isinstance(grid["runs"], list) else [], 1):
        if not isinstance(entry, dict) or not {"method", "seed"} <= entry.keys():
            problems.append(f"{file}: runs, entry {number}: needs method and seed")
            continue
        lists = {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
        unknown = [str(method) for method in lists["method"] if method not in METHODS]
        if unknown:
            problems.append(f"{file}: runs, entry {number}: method: {', '.join(unknown)} is not {' or '.join(METHODS)}")
            continue
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            method, seed = chosen.pop("method"), chosen.pop("seed")
            found[Run(grid["task"], method, tuple(chosen.items()), seed)] = None
    if problems or not found:
        raise UserError(problems or [f"{file}: runs: lists no run"])
    return list(found), grid["split"]


def sweep(file: Path, jobs: int, out: Path | None) -> int:
    """Do what a grid file asks for, `jobs` runs at a time with one thread each, and print the table.

    Args:
        out: JSON file for the summary (the figure goes beside it as .png), or None.

    Returns:
        0, or 1 if a run failed (its log is named; the others are done all the same).
    """
    runs, split = read_grid(file)
    prepare_tiny_world(Path("data/tiny"))
    root = Path("runs/sweeps") / file.stem
    root.mkdir(parents=True, exist_ok=True)
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [(run, pool.submit(_do, run, root / run.folder, split)) for run in runs]
        for number, (run, future) in enumerate(waiting, 1):
            ok = future.result()
            print(f"[{number}/{len(runs)}] {run.folder}: {'done' if ok else 'FAILED'}", flush=True)
            if not ok:
                failed.append(root / run.folder / "sweep.log")
    summary = summarise(runs, root, split)
    print(f"\n{format_summary(summary)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, summary)
        crowded = len(summary["runs"]) > _LABELLED
        points = [
            (row["method"] if crowded else label, seed["source"], seed["target"])
            for label, row in summary["runs"].items()
            for seed in row["seeds"].values()
        ]
        figure = out.with_suffix(".png")
        plot_source_target(points, figure, target_name=summary["task"], title=f"{summary['task']}, tiny scale, {split}")
        print(f"\nsummary: {out}\nfigure: {figure}")
    for log in failed:
        print(f"error: a run failed, see {log}", file=sys.stderr)
    return 1 if failed else 0


def _do(run: Run, folder: Path, split: str) -> bool:
    scores = folder / split
    if (scores / "results.json").is_file():
        return True
    flags = [word for key, value in (*run.settings, ("seed", run.seed)) for word in (f"--{key}", str(value))]
    config = f"configs/tiny/{run.task}_{run.method}.yaml"
    train = ["train", "--config", config, *flags, "--output_dir", str(folder / "run")]
    evaluate = ["eval", "--model", str(folder / "run"), "--tasks", ",".join((run.task, *SOURCES))]
    evaluate += ["--target", run.task, "--data_root", "data/tiny", "--split", split, "--batch_size", "100"]
    evaluate += ["--output_dir", str(scores)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.log", "w", encoding="utf-8") as log:
        for command in (train, evaluate):
            done = subprocess.run(
                [sys.executable, "-m", "llava_sculpt.cli", *command],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                check=False,
            )
            if done.returncode != 0:
                return False
    return True


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % interval by Student's t; None for the width of a single value."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), _T[len(values) - 2] * stdev(values) / math.sqrt(len(values))


def summarise(runs: list[Run], root: Path, split: str) -> dict[str, Any]:
    """Scores of all finished runs: per label the values of each seed, mean and half width of the 95 % interval."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        file = root / run.folder / split / "results.json"
        if not file.is_file():
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        row = rows.setdefault(run.label, {"method": run.method, "settings": dict(run.settings), "seeds": {}})
        scores = {name: round(entry["score"], 2) for name, entry in results["tasks"].items()}
        row["seeds"][str(run.seed)] = {**{key: round(results[key], 2) for key in _SCORES}, "tasks": scores}
    for row in rows.values():
        for key in _SCORES:
            mean, width = mean_and_interval([scores[key] for scores in row["seeds"].values()])
            row[key] = {"mean": round(mean, 2), "interval95": None if width is None else round(width, 2)}
    return {"task": runs[0].task, "split": split, "runs": rows}


def format_summary(summary: dict[str, Any]) -> str:
    """One line per label, best Avg first."""
    rows = sorted(summary["runs"].items(), key=lambda item: -item[1]["avg"]["mean"])
    width = max([len(label) for label, _ in rows], default=0)
    lines = [
        f"{summary['task']}, {summary['split']}".ljust(width) + "  seeds        Source        Target           Avg"
    ]
    for label, row in rows:
        cells = []
        for key in _SCORES:
            half = row[key]["interval95"]
            cells.append(f"{row[key]['mean']:6.2f} " + ("       " if half is None else f"± {half:5.2f}"))
        lines.append(f"{label.ljust(width)}  {len(row['seeds']):5}  " + "  ".join(cells))
    return "\n".join(lines)
