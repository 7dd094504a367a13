"""The jobs that produce missing results, in order, with estimated times.

A job makes one adapter (by training, or by editing a trained one) and scores it. An adapter that several runs need is
made once: LoRA's feeds DARE, Model Tailor and post-pruning. A result that is there is not made again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from typing_extensions import NotRequired, TypedDict

from llava_sculpt.experiments.grid import Run
from llava_sculpt.names import ZERO_SHOT
from llava_sculpt.records import read_checked

# Seconds assumed where nothing was measured: training of one epoch, an edit, scoring of one model. Tiny: one thread on
# a core of a shared machine. Paper: 4 x RTX 4090, computed (docs/reproduce.md).
_ASSUMED = {
    "tiny": {"train": 45.0, "edit": 20.0, "evaluate": 15.0},
    "paper": {"train": 900.0, "edit": 900.0, "evaluate": 4500.0},
}


class _Run(TypedDict):
    status: NotRequired[str]


@dataclass(frozen=True)
class Job:
    """Make one adapter and score it.

    Args:
        run: whose adapter (none is made for zero-shot).
        scores: the results to write: the same run, once for each split asked for; () if only the adapter is needed.
        after: name of the adapter that another job makes before, None if there is none to wait for.
        seconds: estimated.
    """

    run: Run
    scores: tuple[Run, ...]
    after: str | None
    seconds: float

    @property
    def label(self) -> str:
        """What is being done, for a person."""
        run = self.run
        if run.method == ZERO_SHOT:
            return ZERO_SHOT
        what = "/".join(scored.split for scored in self.scores) or "adapter only"
        return f"{run.task} {run.method} r{run.setting('lora_r')} seed {run.seed} ({what})"


def adapter_root(scale: str) -> Path:
    """Where the adapters of a scale are made and kept; they can always be made again."""
    return Path("runs/experiments") / scale


def adapter_folder(run: Run) -> Path:
    """Folder of the run's adapter."""
    return adapter_root(run.scale) / run.adapter_name


def is_made(run: Run) -> bool:
    """Whether the run's adapter is there, whole: training says when it has ended, an edit appears in one rename."""
    folder = adapter_folder(run)
    if run.parent is not None:
        return folder.is_dir()
    file = folder / "run.json"
    return file.is_file() and read_checked(file, _Run).get("status") == "finished"


def make_plan(runs: Iterable[Run], results: Mapping[str, dict[str, Any]]) -> list[Job]:
    """The jobs for the results that are missing, in an order that can be followed one by one.

    Seed by seed, so that an interrupted plan leaves whole tables; within a seed parents before edits, and the long
    jobs first, so that several at a time end together.

    Args:
        results: existing ones, by run name.
    """
    scores: dict[str, list[Run]] = {}
    makers: dict[str, Run] = {}
    for run in {run.name: run for run in runs if run.name not in results}.values():
        makers[run.adapter_name] = run
        scores.setdefault(run.adapter_name, []).append(run)
    for run in list(makers.values()):
        if run.parent is not None and not is_made(run) and not is_made(run.parent):
            makers.setdefault(run.parent.adapter_name, run.parent)
    estimate = Estimate(results)
    jobs = []
    for name, run in makers.items():
        after = run.parent.adapter_name if run.parent is not None else None
        splits = scores.get(name, [])
        jobs.append(Job(run, tuple(splits), after if after in makers else None, estimate.seconds(run, len(splits))))
    return sorted(jobs, key=lambda job: (job.run.seed or 0, job.after is not None, -job.seconds))


class Estimate:
    """How long a run takes, from earlier results of its scale, of the same method where there are any."""

    def __init__(self, results: Mapping[str, dict[str, Any]]) -> None:
        self._measured: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for content in results.values():
            run = content["run"]
            for part, value in content["record"].get("seconds", {}).items():
                for key in _keys(part, run["task"], run["method"]):
                    self._measured[key].append(value / _units(part, run.get("settings", {})))

    def seconds(self, run: Run, scores: int) -> float:
        """For making the adapter, if it is not there, and scoring it so many times."""
        making = 0.0
        if run.method != ZERO_SHOT and not is_made(run):
            making = self._part(run, "edit") if run.parent is not None else self._part(run, "train")
        return making + scores * self._part(run, "evaluate")

    def _part(self, run: Run, part: str) -> float:
        known = next((self._measured[key] for key in _keys(part, run.task, run.method) if key in self._measured), None)
        return (median(known) if known else _ASSUMED[run.scale][part]) * _units(part, dict(run.settings))


def _keys(part: str, task: str, method: str) -> list[tuple[str, ...]]:
    """From the closest to the widest."""
    return [(part, task, method), (part, method), (part,)]


def _units(part: str, settings: Mapping[str, Any]) -> float:
    """Epochs of a training; one edit, one evaluation."""
    return float(settings.get("num_train_epochs", 3)) if part == "train" else 1.0
