"""How well the forgetting probe follows the loss of Source: rank correlations over the runs of its grid.

python benchmarks/forgetting.py

The loss is zero-shot Source minus the run's Source, the measures are those of its last step; beside them the learning
rate, which foretells forgetting without any measurement. Intervals: percentiles of 10,000 bootstrap samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_sculpt.experiments.grid import read_grid
from llava_sculpt.experiments.results import read_results
from llava_sculpt.names import ZERO_SHOT

SCALE = "tiny"
MEASURES = ("forgetting_kl", "forgetting_changed")
SMALL_LOSS = 10.0
SAMPLES = 10_000

Numbers = NDArray[np.float64]


def ranks(values: Numbers) -> Numbers:
    """Rank of each value from 0 on; equal values have the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts + 1) / 2)[group]


def spearman(x: Numbers, y: Numbers) -> float:
    """Spearman's rank correlation, NaN where all values of one side are equal."""
    a, b = ranks(x), ranks(y)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def interval(x: Numbers, y: Numbers) -> tuple[float, float]:
    """95 % bootstrap interval of `spearman` over the pairs."""
    rng = np.random.default_rng(0)
    found = [spearman(x[chosen], y[chosen]) for chosen in rng.integers(0, len(x), (SAMPLES, len(x)))]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    grid, results = read_grid("forgetting", SCALE), read_results(SCALE)
    zero_shot = next(run for run in grid.runs if run.method == ZERO_SHOT)
    runs = [run for run in grid.runs if run is not zero_shot and run.name in results]
    print(f"{len(runs)} of {len(grid.runs) - 1} runs")
    print("method  rank  learning rate     KL  changed  Source   loss  Target")
    rows = []
    for run in runs:
        scores, measured = results[run.name]["scores"][run.task], results[run.name]["forgetting"]
        loss = results[zero_shot.name]["scores"][run.task]["source"] - scores["source"]
        rows.append([loss, *(measured[name][-1] for name in MEASURES), run.setting("learning_rate")])
        setting = f"{run.method:6}  {run.setting('lora_r'):4}  {run.setting('learning_rate'):13g}"
        measures = f"{rows[-1][1]:5.3f}  {rows[-1][2]:6.0%}"
        print(f"{setting}  {measures}  {scores['source']:6.2f}  {loss:5.2f}  {scores['target']:6.2f}")
    table = np.array(rows)
    print("\nSpearman's rank correlation with the loss of Source [95 % interval]")
    small = f"loss below {SMALL_LOSS:g} points"
    for name, chosen in (("all runs", np.full(len(table), True)), (small, table[:, 0] < SMALL_LOSS)):
        loss, *measures = table[chosen].T
        for measure, values in zip((*MEASURES, "learning_rate"), measures, strict=True):
            low, high = interval(values, loss)
            print(f"{name}, n = {len(loss)}: {measure:18}  {spearman(values, loss):.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
