"""Attacks on what evaluations and experiments leave behind: results, journals, result files, markers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.cli import main
from llava_sculpt.evaluation import run
from llava_sculpt.evaluation.journal import Journal
from llava_sculpt.evaluation.prepared import load_tasks
from llava_sculpt.evaluation.results_file import read_results_file
from llava_sculpt.evaluation.table import format_details, format_table
from llava_sculpt.experiments import finetune, runner, tiny_data
from llava_sculpt.experiments.grid import read_grid
from llava_sculpt.experiments.pages import PAGES, render
from llava_sculpt.experiments.report import TABLE_GRIDS, gather
from llava_sculpt.experiments.results import read_results, result_file, write_result
from llava_sculpt.tasks import prepare_benchmark
from tests.attack.attack import break_file, fresh_copy, mutate_json_file, outcome
from tests.attack.test_data import answering
from tests.experiments.made_up import made_up_result
from tests.tasks.conftest import WRITERS

REPOSITORY = Path(__file__).parents[2]
Tries = Iterator[random.Random]


def damage(rng: random.Random, file: Path) -> str:
    return rng.choice([break_file, mutate_json_file, mutate_json_file])(rng, file)


def test_result_files(tries: Tries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    for run_ in {r.name: r for name in (*TABLE_GRIDS, "fig5") for r in read_grid(name, "tiny").runs}.values():
        write_result(result_file("tiny", run_.name), made_up_result(run_))
    folder = tmp_path / "results" / "tiny" / "runs"
    files = sorted(folder.glob("*.json"))
    untouched = {file: file.read_bytes() for file in files}

    def pages() -> int:
        report = gather("tiny", read_results("tiny"))
        for page in PAGES:
            render(report, page)
        return 0

    for rng in tries:
        file = rng.choice(files)
        change = damage(rng, file)
        found = outcome(lambda: main(["experiment", "table1", "--scale", "tiny", "--dry_run"]), capsys)
        assert found.code in (0, 2), (change, found)
        if found.code == 0 and rng.random() < 0.1:
            assert outcome(pages).code in (0, 2), change
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_bytes(untouched[file])


def test_results_and_journals_of_an_evaluation(
    tries: Tries, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(run, "generate_answers", answering)
    WRITERS["gqa"](tmp_path / "raw")
    prepare_benchmark("gqa", tmp_path / "raw", tmp_path / "data" / "gqa")
    loaded = load_for_inference(str(checkpoint))

    def evaluate(out: Path) -> dict[str, Any]:
        return {**run.evaluate(loaded, load_tasks(["gqa"], tmp_path / "data", "test"), out, label="random")}

    expected = evaluate(tmp_path / "whole")
    answers = (tmp_path / "whole/predictions/gqa.jsonl").read_bytes()
    with patch.object(Journal, "remove", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "half")
    (tmp_path / "half" / "predictions" / "gqa.jsonl").unlink()
    for rng in tries:
        out = fresh_copy(tmp_path / "half", tmp_path / "now")
        file = out / rng.choice(["results.json", "predictions/gqa.part0.jsonl"])
        change = break_file(rng, file) if file.suffix == ".jsonl" else damage(rng, file)
        found = outcome(partial(evaluate, out))
        if found.code == 0:
            assert (out / "predictions/gqa.jsonl").read_bytes() == answers, change
            assert read_results_file(out / "results.json") == expected, change
        elif file.name == "results.json":
            assert not (out / "predictions/gqa.jsonl").exists(), change


def test_earlier_results_in_a_table(tries: Tries, tmp_path: Path, capsys: Any) -> None:
    entry = {"score": 50.0, "n": 3, "metric": "accuracy", "variant": "v", "split": "test"}
    entry |= {"prompt_style": "short", "decoding": "greedy"}
    known: Any = {
        **{"model_id": "m", "base": "b", "tasks": {"gqa": entry}, "config_hash": "c", "versions": {"torch": "2"}},
        **{"source": 50.0, "target": 40.0, "target_task": "iconqa", "avg": 45.0},
        "settings": {"split": "test", "max_new_tokens": 8, "data": {}, "prompt_styles": {}, "scorers": {}},
        "inputs": {"model": "m", "processing": "p", "images": {"gqa": "i"}},
    }
    file = tmp_path / "results.json"
    for rng in tries:
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_text(json.dumps(known))
        change = damage(rng, file)

        def show() -> int:
            earlier = finetune._read_or_skip(file)
            if earlier is not None and finetune._comparable(earlier, known):
                format_table([("earlier", earlier), ("this", known)])
                format_details(earlier)
            return 0

        assert outcome(show).code == 0, change


def test_markers(tries: Tries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """world.json of the tiny world, origin.json of an experiment's adapters."""
    monkeypatch.chdir(tmp_path)
    made: list[Path] = []
    monkeypatch.setattr(tiny_data, "write_raw_world", lambda root, seed: made.append(root))
    monkeypatch.setattr(tiny_data, "prepare_benchmark", lambda *args, **options: None)
    root = tmp_path / "world"
    tiny_data.prepare_tiny_world(root)
    origin: Any = {"base": "b", "train": {"iconqa": "i"}}
    runner._keep_adapters_of(origin, "tiny")
    adapters = tmp_path / "runs" / "experiments" / "tiny"
    whole = {file: file.read_bytes() for file in (root / "world.json", adapters / "origin.json")}
    for rng in tries:
        file = rng.choice(list(whole))
        change, count = damage(rng, file), len(made)
        there = json.loads(whole[file]) == _value(file)
        if file.name == "world.json":
            found = outcome(lambda: tiny_data.prepare_tiny_world(root))
            assert found.code == 2 or there == (len(made) == count), change
        else:
            assert outcome(lambda: runner._keep_adapters_of(origin, "tiny")).code in (0, 2), change
        if file.is_dir():
            file.rmdir()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(whole[file])


def _value(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
