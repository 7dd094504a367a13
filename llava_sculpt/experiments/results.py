"""Result files: one JSON per run in results/SCALE/runs/, and means with intervals over seeds.

Everything but `record` (times, versions, memory) is the same whenever and wherever a run is repeated on one kind of
machine, so a result can be checked by doing it again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from llava_sculpt.errors import UserError
from llava_sculpt.experiments.grid import identity_hash
from llava_sculpt.names import SOURCES
from llava_sculpt.records import read_checked, write_atomically

RECORD = "record"  # the one part that may differ between two repetitions of a run
# Student's t, 97.5 %, for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


_ROUNDED = 2e-4  # the scores are written with four decimals
Finite = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]


class RunFacts(TypedDict):
    """What a run is, as `grid.Run.identity` says it."""

    task: str
    method: str
    seed: Annotated[int, Ge(1)] | None
    split: Literal["val", "test"]
    scale: str
    settings: dict[str, Any]


class Summary(TypedDict):
    """Means of a run for a Target."""

    source: Finite
    target: Finite
    avg: Finite


class TaskScore(TypedDict):
    """A task's score and what it is."""

    score: Finite
    n: Annotated[int, Ge(1)]
    metric: str
    variant: str


class Record(TypedDict):
    """What may differ between two repetitions of a run."""

    seconds: dict[str, Annotated[Finite, Ge(0)]]
    versions: dict[str, str]


class Densities(TypedDict):
    """Densities of A, B, BA and Theorem 3.1's, by module: one number for each of `parts`."""

    parts: list[str]
    total: list[Finite]
    modules: Annotated[dict[str, list[Finite]], Field(min_length=1)]


class RunResult(TypedDict):
    """A result file, as far as it is relied on."""

    run: RunFacts
    scores: Annotated[dict[str, Summary], Field(min_length=1)]
    tasks: dict[str, TaskScore]
    base: str
    data: dict[str, str]
    record: Record
    curve: NotRequired[dict[str, list[Finite]]]
    forgetting: NotRequired[dict[str, list[Finite]]]
    densities: NotRequired[Densities]


def results_folder(scale: str) -> Path:
    """Where the result files of a scale are."""
    return Path("results") / scale / "runs"


def result_file(scale: str, name: str) -> Path:
    """The result file of the run of that name."""
    return results_folder(scale) / f"{name}.json"


def write_result(file: Path, content: dict[str, Any]) -> None:
    """Write a result atomically, one line for each of its parts (a readable diff, and a third of the size)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"{json.dumps(key)}: {json.dumps(content[key], sort_keys=True)}" for key in sorted(content)]
    write_atomically(file, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def read_results(scale: str) -> dict[str, dict[str, Any]]:
    """All results of a scale by run name.

    Raises:
        UserError: every file that is not a result.
    """
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for file in sorted(results_folder(scale).glob("*.json")):
        try:
            content: dict[str, Any] = {**read_checked(file, RunResult)}
            _check_whole(file, content)
            found[file.stem] = content
        except UserError as error:
            problems += [f"{problem} (delete the file and its run is done again)" for problem in error.problems]
    if problems:
        raise UserError(problems)
    return found


def _check_whole(file: Path, content: dict[str, Any]) -> None:
    """Refuse what contradicts itself: a result of another run, a summary of other scores, cut lists.

    Raises:
        UserError: the first contradiction.
    """
    run = {key: value for key, value in content["run"].items() if key != "parent"}
    problem, tasks = None, {name: task["score"] for name, task in content["tasks"].items()}
    if not file.stem.endswith(f"_{identity_hash(run)}"):
        problem = "run: not the run that the file is named after"
    for target, summary in content["scores"].items():
        if not {target, *SOURCES} <= tasks.keys():
            problem = f"tasks: scores of {target} or of a Source task are missing"
            break
        source = sum(tasks[name] for name in SOURCES) / len(SOURCES)
        wanted = {"source": source, "target": tasks[target], "avg": (source + tasks[target]) / 2}
        if any(abs(summary[key] - value) > _ROUNDED for key, value in wanted.items()):
            problem = f"scores.{target}: not what the tasks' scores come to"
    densities = content.get("densities")
    for part in ("curve", "forgetting"):
        curve = content.get(part, {})
        if curve and ("step" not in curve or len({len(values) for values in curve.values()}) > 1):
            problem = f"{part}: not one value of each quantity for each step"
    if densities and {len(values) for values in (densities["total"], *densities["modules"].values())} != {4}:
        problem = "densities: not four numbers for each module"
    if problem:
        raise UserError(f"{file}: {problem}")


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % interval by Student's t; None for the width of a single value."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), _t(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _t(freedom: int) -> float:
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964  # Student's t in powers of 1 / freedom, to four digits from 30 on
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
