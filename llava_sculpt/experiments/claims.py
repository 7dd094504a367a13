"""The paper's findings, each with what our runs say of it.

A finding is a difference between two kinds of run, taken seed by seed and averaged over what it is claimed for. It
**appears** if the 95 % interval of the difference lies on the claimed side of 0, **does not** if it lies on the other
side, and is **not shown** if it holds 0 (more seeds could decide). Missing runs are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llava_sculpt.experiments.results import mean_and_interval
from llava_sculpt.experiments.summary import Row
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
    claims = []
    for task in TARGETS:
        here = [row for row in rows["table1"] if row.task == task]
        ranks = sorted({row.run.setting("lora_r") for row in here if row.run.seed is not None})
        claims += [
            _rank(task, here, ranks),
            _kept(task, here, ranks),
            _best(task, here, ranks),
            _stable_ranks(task, here, ranks),
        ]
    claims += [_connector(rows["table2"]), _stable_epochs(rows["fig3"])]
    for task in TARGETS:
        claims += _parts(task, [row for row in rows["table3"] if row.task == task])
    claims += [_density(task, [row for row in rows["fig5"] if row.task == task]) for task in TARGETS]
    order = list(dict.fromkeys(claim.finding for claim in claims))
    return sorted(claims, key=lambda claim: order.index(claim.finding))


def _find(rows: Iterable[Row], method: str, **settings: Any) -> Row | None:
    return next(
        (r for r in rows if r.run.method == method and all(r.run.setting(k) == v for k, v in settings.items())), None
    )


def _values(row: Row | None, score: str) -> Seeds:
    return {} if row is None else row.values(score)


def _mean_over(parts: Sequence[Seeds]) -> Seeds:
    """Mean over the parts for the seeds that all of them have."""
    if not parts:
        return {}
    shared = [seed for seed in parts[0] if all(seed in part for part in parts)]
    return {seed: fmean(part[seed] for part in parts) for seed in shared}


def _minus(first: Seeds, second: Seeds) -> list[float]:
    return [first[seed] - second[seed] for seed in first if seed in second]


def _told(differences: Sequence[float]) -> str:
    mean, half = mean_and_interval(differences)
    return f"{mean:+.2f}" + (" (one seed)" if half is None else f" ± {half:.2f}")


def _verdict(differences: Sequence[float], at_least: float = 0.0) -> str:
    """Of "the difference is above `at_least`"; contrary is always below 0."""
    if not differences:
        return MISSING
    mean, half = mean_and_interval(differences)
    if half is None:
        return NOT_SHOWN
    return APPEARS if mean - half > at_least else CONTRARY if mean + half < 0 else NOT_SHOWN


def _claim(finding: str, task: str, what: str, differences: Sequence[float]) -> Claim:
    verdict = _verdict(differences)
    return Claim(finding, task, verdict, f"{what}: {_told(differences)}" if differences else "")


def _rank(task: str, rows: Sequence[Row], ranks: Sequence[int]) -> Claim:
    low, high = (_values(_find(rows, "lora", lora_r=rank), "source") for rank in (ranks[0], ranks[-1]))
    what = f"LoRA's Source at rank {ranks[0]} minus rank {ranks[-1]}"
    return _claim("LoRA's forgetting grows with rank", task, what, _minus(low, high))


def _over_ranks(rows: Sequence[Row], method: str, score: str, ranks: Sequence[int]) -> Seeds:
    return _mean_over([_values(_find(rows, method, lora_r=rank), score) for rank in ranks])


def _kept(task: str, rows: Sequence[Row], ranks: Sequence[int]) -> Claim:
    finding = "LoRASculpt keeps more Source than LoRA at no lower Target"
    source, target = (
        _minus(_over_ranks(rows, "sculpt", score, ranks), _over_ranks(rows, "lora", score, ranks))
        for score in ("source", "target")
    )
    if not source:
        return Claim(finding, task, MISSING, "")
    margin = TARGET_MARGIN * fmean(_over_ranks(rows, "lora", "target", ranks).values())
    verdicts = {_verdict(source), _verdict(target, -margin)}
    verdict = APPEARS if verdicts == {APPEARS} else CONTRARY if CONTRARY in verdicts else NOT_SHOWN
    evidence = f"mean over ranks, Source {_told(source)}, Target {_told(target)} (a loss of {margin:.2f} is allowed)"
    return Claim(finding, task, verdict, evidence)


def _best(task: str, rows: Sequence[Row], ranks: Sequence[int]) -> Claim:
    finding = "LoRASculpt has the best Avg of all methods"
    methods = [
        method for method in METHODS if any(row.run.method == method and row.run.seed is not None for row in rows)
    ]
    avg = {method: _over_ranks(rows, method, "avg", ranks) for method in methods}
    absent = [METHODS[method].label for method, values in avg.items() if not values]
    if absent:
        return Claim(finding, task, MISSING, f"no complete seed of {', '.join(absent)}")
    rival = max((method for method in methods if method != "sculpt"), key=lambda method: fmean(avg[method].values()))
    what = f"mean over ranks, Avg minus that of the best other method, {METHODS[rival].label}"
    return _claim(finding, task, what, _minus(avg["sculpt"], avg[rival]))


def _less_change(task: str, finding: str, along: str, at: Callable[[str, bool], Seeds]) -> Claim:
    """LoRA's loss of Source between the first and last setting, minus LoRASculpt's."""
    losses = []
    for method in ("lora", "sculpt"):
        first, last = at(method, True), at(method, False)
        losses.append({seed: first[seed] - last[seed] for seed in first if seed in last})
    return _claim(finding, task, f"{along}, LoRA loses more Source than LoRASculpt by", _minus(losses[0], losses[1]))


def _stable_ranks(task: str, rows: Sequence[Row], ranks: Sequence[int]) -> Claim:
    return _less_change(
        task,
        "LoRASculpt is stabler than LoRA over ranks",
        f"from rank {ranks[0]} to {ranks[-1]}",
        lambda method, first: _values(_find(rows, method, lora_r=ranks[0 if first else -1]), "source"),
    )


def _stable_epochs(rows: Sequence[Row]) -> Claim:
    epochs = sorted({row.run.setting("num_train_epochs") for row in rows if row.run.seed is not None})
    return _less_change(
        "iconqa",
        "LoRASculpt is stabler than LoRA over epochs",
        f"from {epochs[0]} to {epochs[-1]} epochs",
        lambda method, first: _values(_find(rows, method, num_train_epochs=epochs[0 if first else -1]), "source"),
    )


def _connector(rows: Sequence[Row]) -> Claim:
    frozen, full = (_values(_find(rows, "lora", connector=mode), "source") for mode in ("frozen", "full"))
    what = "LoRA at rank 64, Source with the connector frozen minus fully fine-tuned"
    return _claim("Full fine-tuning of the connector makes LoRA forget", "iconqa", what, _minus(frozen, full))


def _parts(task: str, rows: Sequence[Row]) -> list[Claim]:
    found = {parts_of(row): row for row in rows if row.run.seed is not None}
    neither, srr, both = (found.get(parts) for parts in ((False, False), (True, False), (True, True)))
    claims = []
    for finding, better, worse in (("SRR alone helps", srr, neither), ("RKH adds to SRR", both, srr)):
        claim = _claim(finding, task, "Avg", _minus(_values(better, "avg"), _values(worse, "avg")))
        if claim.verdict != MISSING:
            further = (
                f"{s.title()} {_told(_minus(_values(better, s), _values(worse, s)))}" for s in ("source", "target")
            )
            claim = Claim(finding, task, claim.verdict, ", ".join([claim.evidence, *further]))
        claims.append(claim)
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
