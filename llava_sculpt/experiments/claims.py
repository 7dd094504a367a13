"""The paper's findings, each with what our runs say of it.

A finding is a difference between two kinds of run, taken seed by seed and averaged over what it is claimed for. It
**appears** if the 95 % interval of the difference lies on the claimed side of 0, **does not** if it lies on the other
side, and is **not shown** if it holds 0 (more seeds could decide). Missing runs are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from llava_sculpt.experiments.results import mean_and_interval
from llava_sculpt.experiments.summary import Row, mean_over
from llava_sculpt.experiments.tables import parts_of
from llava_sculpt.names import METHODS, TARGETS

APPEARS, CONTRARY, NOT_SHOWN, MISSING = "appears", "does not", "not shown", "runs missing"
# "No lower Target" is shown if a loss of more than this share of LoRA's Target is excluded.
TARGET_MARGIN = 0.02
_NEARLY_ALL = 0.9

Seeds = Mapping[int | None, float]


@dataclass(frozen=True)
class Claim:
    """A finding of the paper on one task, the verdict, and the numbers behind it."""

    finding: str
    task: str
    verdict: str
    evidence: str


def judge(rows: Mapping[str, Sequence[Row]]) -> list[Claim]:
    """All findings.

    Args:
        rows: of every grid, by its name.
    """

    def of(task: str, grid: str) -> list[Row]:
        return [row for row in rows[grid] if row.task == task]

    claims = []
    for task in TARGETS:
        table1 = of(task, "table1")
        claims += [_rank(task, table1), _kept(task, table1), _best(task, table1), _stabler(task, table1, *_RANKS)]
    claims += [_connector(rows["table2"]), _stabler("iconqa", rows["fig3"], *_EPOCHS)]
    claims += [claim for task in TARGETS for claim in _parts(task, of(task, "table3"))]
    claims += [_density(task, of(task, "fig5")) for task in TARGETS]
    order = list(dict.fromkeys(claim.finding for claim in claims))
    return sorted(claims, key=lambda claim: order.index(claim.finding))


def _mean(rows: Sequence[Row], method: str, score: str, **settings: Any) -> Seeds:
    """By seed, the mean over a method's rows that have these settings."""
    return mean_over([row for row in rows if row.run.method == method and _has(row, settings)], score)


def _has(row: Row, settings: Mapping[str, Any]) -> bool:
    return all(row.run.setting(key) == value for key, value in settings.items())


def _minus(first: Seeds, second: Seeds) -> dict[int | None, float]:
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def _format(differences: Seeds) -> str:
    mean, half = mean_and_interval(list(differences.values()))
    return f"{mean:+.2f}" + (" (one seed)" if half is None else f" ± {half:.2f}")


def _verdict(differences: Seeds, at_least: float = 0.0) -> str:
    """Of "the difference is above `at_least`"; contrary is always below 0."""
    if not differences:
        return MISSING
    mean, half = mean_and_interval(list(differences.values()))
    if half is None:
        return NOT_SHOWN
    return APPEARS if mean - half > at_least else CONTRARY if mean + half < 0 else NOT_SHOWN


def _claim(finding: str, task: str, what: str, differences: Seeds) -> Claim:
    return Claim(finding, task, _verdict(differences), f"{what}: {_format(differences)}" if differences else "")


def _ends(rows: Sequence[Row], setting: str) -> tuple[Any, Any]:
    """The lowest and the highest value of a setting."""
    values = [row.run.setting(setting) for row in rows if row.run.seed is not None]
    return min(values), max(values)


def _rank(task: str, rows: Sequence[Row]) -> Claim:
    low, high = _ends(rows, "lora_r")
    what = f"LoRA's Source at rank {low} minus rank {high}"
    difference = _minus(_mean(rows, "lora", "source", lora_r=low), _mean(rows, "lora", "source", lora_r=high))
    return _claim("LoRA's forgetting grows with rank", task, what, difference)


def _kept(task: str, rows: Sequence[Row]) -> Claim:
    finding = "LoRASculpt keeps more Source than LoRA at no lower Target"
    source, target = (
        _minus(_mean(rows, "sculpt", score), _mean(rows, "lora", score)) for score in ("source", "target")
    )
    if not source:
        return Claim(finding, task, MISSING, "")
    margin = TARGET_MARGIN * fmean(_mean(rows, "lora", "target").values())
    verdicts = {_verdict(source), _verdict(target, -margin)}
    verdict = APPEARS if verdicts == {APPEARS} else CONTRARY if CONTRARY in verdicts else NOT_SHOWN
    evidence = (
        f"mean over ranks, Source {_format(source)}, Target {_format(target)} (a loss of {margin:.2f} is allowed)"
    )
    return Claim(finding, task, verdict, evidence)


def _best(task: str, rows: Sequence[Row]) -> Claim:
    finding = "LoRASculpt has the best Avg of all methods"
    methods = dict.fromkeys(row.run.method for row in rows if row.run.seed is not None)
    avg = {method: _mean(rows, method, "avg") for method in methods}
    absent = [METHODS[method].label for method, values in avg.items() if not values]
    if absent:
        return Claim(finding, task, MISSING, f"no complete seed of {', '.join(absent)}")
    rival = max((method for method in methods if method != "sculpt"), key=lambda method: fmean(avg[method].values()))
    what = f"mean over ranks, Avg minus that of the best other method, {METHODS[rival].label}"
    return _claim(finding, task, what, _minus(avg["sculpt"], avg[rival]))


# For `_stabler`: what is varied, its name in the finding, and how its ends are named.
_RANKS = ("lora_r", "ranks", "from rank {} to {}")
_EPOCHS = ("num_train_epochs", "epochs", "from {} to {} epochs")


def _stabler(task: str, rows: Sequence[Row], setting: str, over: str, along: str) -> Claim:
    """LoRA's loss of Source between the first and last setting, minus LoRASculpt's."""
    ends = _ends(rows, setting)
    lora, sculpt = (
        _minus(*(_mean(rows, method, "source", **{setting: end}) for end in ends)) for method in ("lora", "sculpt")
    )
    what = f"{along.format(*ends)}, LoRA loses more Source than LoRASculpt by"
    return _claim(f"LoRASculpt is stabler than LoRA over {over}", task, what, _minus(lora, sculpt))


def _connector(rows: Sequence[Row]) -> Claim:
    frozen, full = (_mean(rows, "lora", "source", connector=mode) for mode in ("frozen", "full"))
    what = "LoRA at rank 64, Source with the connector frozen minus fully fine-tuned"
    return _claim("Full fine-tuning of the connector makes LoRA forget", "iconqa", what, _minus(frozen, full))


def _parts(task: str, rows: Sequence[Row]) -> list[Claim]:
    found = {parts_of(row): row for row in rows if row.run.seed is not None}
    neither, srr, both = (found[parts] for parts in ((False, False), (True, False), (True, True)))
    claims = []
    for finding, better, worse in (("SRR alone helps", srr, neither), ("RKH adds to SRR", both, srr)):
        (_, avg), *others = ((s, _minus(better.values(s), worse.values(s))) for s in ("avg", "source", "target"))
        claim = _claim(finding, task, "Avg", avg)
        further = "".join(f", {score.title()} {_format(difference)}" for score, difference in others if difference)
        claims.append(replace(claim, evidence=claim.evidence + further))
    return claims


def _density(task: str, rows: Sequence[Row]) -> Claim:
    finding = "The measured density of BA is below Theorem 3.1's"
    results = [result["densities"] for row in rows for result in row.results.values() if "densities" in result]
    if not results:
        return Claim(finding, task, MISSING, "")
    modules = [values for found in results for values in found["modules"].values()]
    below = sum(values[2] < values[3] for values in modules) / len(modules)
    measured, bound = (fmean(found["total"][part] for found in results) for part in (2, 3))
    verdict = APPEARS if below >= _NEARLY_ALL else CONTRARY if below < 0.5 else NOT_SHOWN
    evidence = f"in {below:.1%} of the matrices of {len(results)} runs; over all {measured:.2%} against {bound:.2%}"
    return Claim(finding, task, verdict, evidence)
