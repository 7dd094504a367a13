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
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.records import write_atomically

RECORD = "record"  # the one part that may differ between two repetitions of a run
# Student's t, 97.5 %, for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


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
            content = json.loads(file.read_text(encoding="utf-8"))
            if not {"run", "scores", "tasks", RECORD} <= content.keys():
                raise ValueError("parts are missing")
            found[file.stem] = content
        except (ValueError, AttributeError) as error:
            problems.append(f"{file}: not a result file ({error}); delete it and its run is done again")
    if problems:
        raise UserError(problems)
    return found


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
