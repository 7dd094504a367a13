"""Sweeps: what a grid file means, what is refused, and the interval over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_sculpt.errors import UserError
from llava_sculpt.experiments.sweep import format_summary, mean_and_interval, read_grid, summarise

GRIDS = sorted((Path(__file__).parents[2] / "configs" / "grids").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    file = folder / "grid.yaml"
    file.write_text(text)
    return file


def test_a_list_stands_for_all_combinations_and_none_twice(tmp_path: Path) -> None:
    runs, split = read_grid(
        write(
            tmp_path,
            "task: coco\nsplit: val\nruns:\n"
            "  - {method: [lora, sculpt], learning_rate: [1.0e-3, 2.0e-3], seed: [1, 2]}\n"
            "  - {method: lora, learning_rate: 1.0e-3, seed: 1}\n",
        )
    )
    assert split == "val"
    assert len(runs) == len({run.folder for run in runs}) == 8
    assert runs[0].folder == "lora_learning_rate=0.001_seed=1"


def test_everything_wrong_is_reported_together(tmp_path: Path) -> None:
    file = write(tmp_path, "task: vqa\nsplit: train\nruns:\n  - {method: adapter, seed: 1}\n  - {method: lora}\n")
    with pytest.raises(UserError) as caught:
        read_grid(file)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "task",
        "split",
        "runs, entry 1",
        "runs, entry 2",
    ]


@pytest.mark.parametrize("text", ["", "task: coco", "runs: [", "task: coco\nsplit: val\nruns: []"])
def test_refuses_what_is_no_grid(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        read_grid(write(tmp_path, text))


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_the_repository_s_grids_are_sound_and_give_both_methods_the_same_number_of_runs(file: Path) -> None:
    runs, _ = read_grid(file)
    methods = [run.method for run in runs]
    assert methods.count("lora") == methods.count("sculpt") > 0


def test_interval_is_student_s() -> None:
    # 1, 2, 3: standard deviation 1, t(2 degrees of freedom, 97.5 %) = 4.3027
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert mean_and_interval([5.0]) == (5.0, None)


def test_summary_takes_the_finished_runs_only(tmp_path: Path) -> None:
    runs, split = read_grid(write(tmp_path, "task: coco\nsplit: val\nruns:\n  - {method: lora, seed: [1, 2, 3]}\n"))
    for run, avg in zip(runs[:2], (50.0, 60.0), strict=True):
        folder = tmp_path / run.folder / split
        folder.mkdir(parents=True)
        content = {"source": 70.0, "target": 2 * avg - 70, "avg": avg, "tasks": {"coco": {"score": 2 * avg - 70}}}
        (folder / "results.json").write_text(json.dumps(content))
    summary = summarise(runs, tmp_path, split)
    row = summary["runs"]["lora"]
    assert set(row["seeds"]) == {"1", "2"}
    assert row["avg"] == {"mean": 55.0, "interval95": pytest.approx(12.706 * 7.0711 / 2**0.5, abs=0.01)}
    assert row["source"]["interval95"] == 0
    assert "55.00" in format_summary(summary)
