"""Grids: what a file means, what is refused, which runs are one, and what a plan of them does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_sculpt.errors import UserError
from llava_sculpt.experiments.grid import read_grid
from llava_sculpt.experiments.jobs import adapter_folder, make_plan
from llava_sculpt.experiments.runner import experiment
from llava_sculpt.experiments.summary import rows_of
from llava_sculpt.names import SCALES
from tests.experiments.conftest import REPOSITORY, write_grid

TABLES = ["table1", "table2", "table3", "tableI", "fig1", "fig3", "fig4", "fig5"]


@pytest.fixture
def here(study: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(study)
    return study


def test_a_list_stands_for_all_combinations_and_none_twice(here: Path) -> None:
    entry = {"method": "lora", "task": "coco", "learning_rate": [1e-3, 2e-3]}
    write_grid(here, "mini", [entry, {**entry, "learning_rate": 1e-3}, {"method": "zero_shot"}], seed=5)
    grid = read_grid("mini", "tiny", seeds=2)
    assert len(grid.runs) == len({run.name for run in grid.runs}) == 5
    assert {run.seed for run in grid.runs} == {5, 6, None} and {run.split for run in grid.runs} == {"val"}
    assert {run.split for run in read_grid("mini", "tiny", split="test").runs} == {"test"}


def test_settings_are_yaml_then_values_then_grid(here: Path) -> None:
    (here / "configs/values/tiny.yaml").write_text("iconqa: {dora: {learning_rate: 3.0e-3}, dare: {drop: 0.4}}\n")
    write_grid(here, "mini", [{"method": ["lora", "dora", "dare"], "task": "iconqa", "lora_r": 2}])
    lora, dora, dare = read_grid("mini", "tiny").runs
    assert (lora.setting("learning_rate"), dora.setting("learning_rate")) == (1e-3, 3e-3)
    assert {run.setting("lora_r") for run in (lora, dora, dare)} == {2}
    assert dare.edit == (("drop", 0.4),) and dare.parent == lora
    assert dora.train_flags() == ["--method", "dora", "--seed", "1", "--learning_rate", "0.003", "--lora_r", "2"]


@pytest.mark.parametrize(
    ("entry", "same"),
    [
        ({"lora_r": 4}, True),  # the YAML's own value
        ({"num_train_epochs": 1.0}, True),  # a number is a number
        ({"sculpt_beta": 1e-2}, True),  # there is no LoRA on the connector
        ({"save_steps": 7}, True),
        ({"forgetting_probe": 7}, True),
        ({"sculpt_omega": 2}, False),
        ({"sculpt_alpha": 0}, False),
        ({"connector": "sculpt"}, False),
        ({"per_device_train_batch_size": 6}, False),
    ],
)
def test_equal_runs_have_one_name(here: Path, entry: dict[str, Any], same: bool) -> None:
    write_grid(here, "mini", [{"method": "sculpt", "task": "iconqa"}])
    write_grid(here, "other", [{"method": "sculpt", "task": "iconqa", **entry}])
    assert (read_grid("mini", "tiny").runs[0].name == read_grid("other", "tiny").runs[0].name) is same


def test_what_has_no_effect_does_not_part_two_runs(here: Path) -> None:
    ours = {"method": "sculpt", "task": "iconqa"}
    write_grid(here, "a", [{**ours, "sculpt_alpha": 0, "sculpt_omega": [1, 2]}])
    write_grid(here, "b", [{**ours, "sculpt_density": 1, "sculpt_warmup_steps": [3, 4]}])
    write_grid(here, "c", [{**ours, "connector": "frozen", "mm_projector_lr": [1e-5, 2e-5]}])
    write_grid(here, "d", [{"method": "orth", "task": "iconqa", "reg_lambda": [1e-3, 1e-2]}])
    assert [len(read_grid(name, "tiny").runs) for name in "abcd"] == [1, 1, 1, 2]


def test_everything_wrong_is_reported_together(here: Path) -> None:
    write_grid(
        here,
        "bad",
        [
            {"method": "qlora", "task": "iconqa"},
            {"method": "lora", "task": "vqa"},
            {"task": "iconqa"},
            {"method": "lora", "task": "iconqa", "learning_rat": 1e-3, "lora_r": "many"},
            {"method": "post_prune", "task": "iconqa"},
            {"method": "zero_shot", "lora_r": 4},
        ],
        split="train",
        colour="red",
    )
    with pytest.raises(UserError) as caught:
        experiment(["bad", "table9"], "tiny", seeds=0)
    told = "\n".join(caught.value.problems)
    for words in (
        "--seeds: must be at least 1",
        "unknown key colour",
        "split: 'train' is neither val nor test",
        "entry 1: method: 'qlora' is not one of",
        "entry 2: task: 'vqa' is not one of",
        "entry 3: needs `method`",
        "entry 4: learning_rat: not a setting of lora (configs/tiny/iconqa_lora.yaml); did you mean learning_rate?",
        "entry 4: lora_r: 'many' is not a number",
        "entry 5: post_prune: needs density",
        "entry 6: lora_r: zero_shot has no settings",
        "table9.yaml: no such grid; did you mean table",
    ):
        assert words in told
    assert len(caught.value.problems) == 11


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"method": "model_tailor", "keep": 7}, "keep: must be in (0, 1], got 7"),
        ({"method": "model_tailor", "samples": 2.5}, "samples: must be a whole number, got 2.5"),
        ({"method": "post_prune", "density": float("nan")}, "density: must be finite"),
        ({"method": "lora", "data_path": "other.json"}, "data_path: not a setting of lora"),
        ({"method": "lora", "lora_r": []}, "lora_r: an empty list"),
        ({"method": "lora", "lora_r": list(range(1, 200)), "num_train_epochs": list(range(1, 200))}, "10,000 runs"),
    ],
)
def test_settings_are_checked_before_any_job(here: Path, entry: dict[str, Any], problem: str) -> None:
    write_grid(here, "mini", [{"task": "iconqa", **entry}])
    with pytest.raises(UserError) as caught:
        read_grid("mini", "tiny")
    assert problem in str(caught.value), caught.value


@pytest.mark.parametrize("text", ["", "title: x", "title: x\ntiny: [", "title: x\ntiny: []", "title: x\ntiny: 3"])
def test_refuses_what_is_no_grid(here: Path, text: str) -> None:
    (here / "grid.yaml").write_text(text)
    with pytest.raises(UserError):
        read_grid("grid.yaml", "tiny")


def test_values_have_one_place(here: Path) -> None:
    (here / "configs/values/tiny.yaml").write_text(
        "iconqa: {sculpt: {learning_rate: 1.0e-3}, dare: {drop: 0.5, learning_rate: 1.0e-3}}\nvqa: {}\n"
    )
    write_grid(here, "mini", [{"method": "lora", "task": "iconqa"}])
    with pytest.raises(UserError) as caught:
        read_grid("mini", "tiny")
    assert len(caught.value.problems) == 3 and "configs/tiny/iconqa_sculpt.yaml" in str(caught.value)
    (here / "configs/values/tiny.yaml").write_text("iconqa: {l2: {reg_lambda: -1}, dare: {drop: 1}, orth: 3}\n")
    with pytest.raises(UserError) as caught:
        read_grid("mini", "tiny")
    assert len(caught.value.problems) == 3 and "dare: drop: must be in [0, 1), got 1" in str(caught.value)


class TestRepository:
    """The grids as they are."""

    @pytest.fixture(autouse=True)
    def repository(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(REPOSITORY)

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("name", TABLES)
    def test_tables_have_both_scales(self, name: str, scale: str) -> None:
        assert read_grid(name, scale).runs

    @pytest.mark.parametrize("scale", SCALES)
    def test_table1_is_the_paper_s(self, scale: str) -> None:
        runs = read_grid("table1", scale).runs
        assert len(runs) == 43
        assert sum(run.parent is None and run.seed is not None for run in runs) == 30
        edits = [run for run in runs if run.parent is not None]
        assert len(edits) == 12 and {run.parent.name for run in edits if run.parent} <= {run.name for run in runs}

    @pytest.mark.parametrize("scale", SCALES)
    def test_tables_share_their_runs(self, scale: str) -> None:
        names = {name: {run.name for run in read_grid(name, scale).runs} for name in TABLES}
        table1 = names["table1"]
        assert names["fig5"] <= table1
        assert len(names["table3"] - table1) == 4  # SRR only and RKH only
        assert len(names["table2"] - table1) == 3  # other connectors
        assert len(names["fig1"] - table1) == 8
        assert len(names["fig3"] - table1) == 12  # four other numbers of epochs
        assert len(names["fig4"] - table1) == 12  # the centre is in all three panels
        assert len(names["tableI"] - names["table2"]) == 4

    @pytest.mark.parametrize("name", ["select", "select_edits"])
    def test_every_method_has_the_same_budget(self, name: str) -> None:
        rows = [row for row in rows_of(read_grid(name, "tiny").runs, {}) if row.run.method not in ("zero_shot",)]
        counts: dict[tuple[str, str], int] = {}
        for row in rows:
            counts[row.task, row.run.method] = counts.get((row.task, row.run.method), 0) + 1
        if name == "select_edits":
            counts = {key: count for key, count in counts.items() if key[1] != "lora"}
        assert set(counts.values()) == {4}


def finish(run: Any) -> None:
    folder = adapter_folder(run)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))


def result(seconds: float) -> dict[str, Any]:
    return {"run": {"scale": "tiny", "task": "coco", "method": "lora"}, "record": {"seconds": {"train": seconds}}}


def test_one_training_feeds_its_edits(here: Path) -> None:
    write_grid(here, "mini", [{"method": ["dare", "model_tailor", "lora"], "task": "iconqa"}, {"method": "zero_shot"}])
    runs = read_grid("mini", "tiny").runs
    by_method = {run.method: run for run in runs}
    plan = make_plan(runs, {})
    assert len(plan) == 4 and all(len(job.scores) == 1 for job in plan)
    order = [job.run.method for job in plan]
    assert order.index("lora") < min(order.index("dare"), order.index("model_tailor"))
    assert {job.after for job in plan if job.run.parent} == {by_method["lora"].adapter_name}

    # LoRA's result is there but not its adapter: the adapter is made again, without being scored.
    name = by_method["lora"].name
    content = {"run": {"scale": "tiny", "task": "iconqa", "method": "lora"}, "record": {"seconds": {}}}
    plan = make_plan(runs, {name: content})
    assert [job.scores for job in plan if job.run.method == "lora"] == [()]
    finish(by_method["lora"])
    plan = make_plan(runs, {name: content})
    assert {job.run.method for job in plan} == {"zero_shot", "dare", "model_tailor"}
    assert all(job.after is None for job in plan)
    adapter_folder(by_method["dare"]).mkdir()
    assert make_plan([by_method["dare"]], {})[0].after is None


def test_only_what_an_edit_needs_is_trained(here: Path) -> None:
    write_grid(here, "mini", [{"method": "post_prune", "task": "coco", "density": [0.1, 0.5]}])
    plan = make_plan(read_grid("mini", "tiny", seeds=2).runs, {})
    assert [(job.run.method, job.run.seed, len(job.scores)) for job in plan] == [
        ("lora", 1, 0),
        ("post_prune", 1, 1),
        ("post_prune", 1, 1),
        ("lora", 2, 0),
        ("post_prune", 2, 1),
        ("post_prune", 2, 1),
    ]


def test_both_splits_are_scored_by_one_job(here: Path) -> None:
    write_grid(here, "mini", [{"method": "lora", "task": "coco"}])
    runs = [run for split in ("val", "test") for run in read_grid("mini", "tiny", split).runs]
    (job,) = make_plan(runs, {})
    assert {run.split for run in job.scores} == {"val", "test"}


def test_dry_run_lists_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid(here, "mini", [{"method": ["lora", "dare"], "task": "coco", "num_train_epochs": 2}])
    assert experiment(["mini"], "tiny", seeds=3, jobs=2, dry_run=True) == 0
    told = capsys.readouterr().out
    assert told.count("coco lora r4") == 3 and told.count("coco dare r4") == 3
    assert "3 trainings, 3 edits of trained adapters, 6 evaluations" in told
    assert not (here / "results").exists() and not (here / "runs").exists()


def test_estimates_come_from_measured_runs(here: Path) -> None:
    write_grid(here, "mini", [{"method": ["lora", "dora"], "task": "coco", "num_train_epochs": 2}])
    lora, dora = read_grid("mini", "tiny").runs
    known = {"a": result(30.0), "b": result(60.0), "c": result(90.0)}  # three epochs each: 10, 20, 30 an epoch
    jobs = {job.run.method: job.seconds for job in make_plan([lora, dora], known)}
    assert jobs["lora"] == jobs["dora"] == 2 * 20 + 15  # evaluation as assumed; DoRA as the nearest that is known
