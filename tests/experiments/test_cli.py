"""`llava-sculpt` as a user types it: bad input ends with one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_sculpt.cli import main
from llava_sculpt.config_reader import parse_config
from llava_sculpt.experiments import finetune
from llava_sculpt.experiments.grid import read_mapping
from llava_sculpt.names import TRAINED, config_file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--model", "data/tiny_llava", "--tasks", "chess"], "chess is not a task"),
        (["eval", "--model", "data/tiny_llava", "--tasks", "gqa", "--data_root", "nowhere"], "gqa is not prepared"),
        (["eval", "--model", "iconqa"], "--model iconqa: a task, which --tasks takes"),
        (["eval", "--model", "nowhere"], "--model nowhere: no folder"),
        (["eval", "--model", "data/tiny_llava", "--tasks", "gqa", "--target", "coco"], "--target coco: not among"),
        (["eval", "--model", "data/tiny_llava", "--gpus", "0"], "--gpus must be at least 1"),
        (["inspect", "nowhere"], "nowhere"),
        (["prepare", "gqa", "--raw", "nowhere", "--out", "x"], "nowhere: folder not found"),
        (["experiment", "tabel1", "--scale", "tiny"], "did you mean table1?"),
        (["experiment", "nowhere.yaml", "--scale", "tiny"], "nowhere.yaml"),
        (["finetune", "iconqa", "--scale", "paper"], "--scale paper cannot run here"),
        (["finetune", "gqa", "--scale", "tiny"], "gqa: no task to train on"),
        (["finetune", "../chess", "--scale", "tiny"], "../chess: no task to train on"),
        (["finetune"], "finetune takes one TASK"),
        (["finetune", "iconqa", "--data", "x.json"], "finetune takes one TASK"),
        (["finetune", "iconqa", "--metric", "vqa"], "--metric: belongs to --data"),
        (["finetune", "iconqa", "--data_path", "x.json"], "--data_path: finetune trains on iconqa and scores it"),
        (["finetune", "--data", "a b.json"], "(--name)"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_flag_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "a", "--model=b"]) == 2
    assert capsys.readouterr().err == "error: --model: given twice\n"


def test_the_token_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At paper scale the command is printed, by the launcher too, and any user of the machine can list it."""
    (tmp_path / "iconqa").mkdir()
    (tmp_path / "iconqa" / "manifest.json").write_text(
        '{"name": "iconqa", "splits": {}, "image_folder": "images", "prompt_style": ""}'
    )
    (tmp_path / "iconqa" / "train.json").write_text("[]")
    monkeypatch.setitem(finetune.DATA, "paper", tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    started = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(finetune.subprocess, "run", lambda words, env, **_: started.append((words, env)) or done)
    for token in (["--hub_token", "hf_secret"], ["--hub-token=hf_secret"]):
        flags = ["--push_to_hub", *token, "--seed", "3", "--per_device_train_batch_size", "2"]
        assert finetune.launch_training("iconqa", "paper", Path("x.yaml"), tmp_path / "run", flags) == 0
        words, environment = started.pop()
        assert "hf_secret" not in " ".join(words) + capsys.readouterr().out and environment["HF_TOKEN"] == "hf_secret"
        assert words.count("--per_device_train_batch_size") == 1 and words[words.index("--seed") + 1] == "3"


def test_a_flag_that_no_command_knows() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llava_sculpt.cli", "inspect", "x", "--colour"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "--colour" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_is_one_flag_of_a_committed_recipe(
    method: str,
    training_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--method` of the main job, down to the configuration that training gets."""
    prepared = tmp_path / "iconqa"
    prepared.mkdir()
    (prepared / "train.json").write_bytes((training_data / "train.json").read_bytes())
    (prepared / "manifest.json").write_text(
        json.dumps({"name": "iconqa", "splits": {}, "image_folder": str(training_data / "images"), "prompt_style": ""})
    )
    monkeypatch.setitem(finetune.DATA, "tiny", tmp_path)
    configs = []
    monkeypatch.setattr(finetune, "train_main", lambda argv: configs.append(parse_config(argv)) or 0)
    recipe = config_file("tiny", "iconqa", method)
    told = ["--method", method, "--lora_r", "16", "--seed", "7", "--reg_lambda", "0.5"]
    assert finetune.launch_training("iconqa", "tiny", recipe, tmp_path / "run", told) == 0
    (config,) = configs
    assert (config.sculpt.method, config.model.lora_r, config.training.seed) == (method, 16, 7)
    assert config.sculpt.reg_lambda == 0.5
    assert config.training.learning_rate == read_mapping(recipe)["learning_rate"]


def test_inspect_tells_densities(train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", max_steps=7) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for module in found["modules"]:
        rank, (rows, columns) = module["rank"], module["shape"]
        assert module["density_A"] == (rank * columns // 10) / (rank * columns)
        assert module["density_B"] == (rank * rows // 10) / (rank * rows)
        assert 0 < module["density_BA"] <= 1
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"total ({len(found['modules'])} modules)" in capsys.readouterr().out
