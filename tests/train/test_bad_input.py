"""Bad input ends with exit code 2 and one message that names the fix; nothing is written over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from llava_sculpt.config_reader import parse_config
from llava_sculpt.errors import UserError
from llava_sculpt.model.files import ADAPTER_FILE, CONNECTOR_FILE, write_tensors
from llava_sculpt.records import WRITING, write_json
from llava_sculpt.train import train as entry
from llava_sculpt.train.train import main
from tests.conftest import make_checkpoint
from tests.runs import Train, same_files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sculpt_density": 0}, "sculpt_density"),
        ({"sculpt_density": 1.5}, "sculpt_density"),
        ({"sculpt_omega": -1}, "sculpt_omega"),
        ({"sculpt_warmup_steps": 18}, "sculpt_warmup_steps"),
        ({"sculpt_warmup_steps": 0}, "sculpt_warmup_steps"),
        ({"lora_r": 33}, "lora_r"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_r": "many"}, "lora_r"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"data_path": "nowhere.json"}, "nowhere.json"),
        ({"eval_strategy": "epoch", "eval_data_path": "nowhere.json"}, "eval_data_path: no such file"),
        ({"image_folder": "nowhere"}, "nowhere"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
    ],
)
def test_one_clear_message_and_nothing_written(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, words: str
) -> None:
    assert train(tmp_path / "run", **change) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert errors and words in errors[0], errors
    assert not (tmp_path / "run").exists()


def test_all_configuration_errors_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    file = tmp_path / "config.yaml"
    wrong = {
        "lora_rank": 8,
        "lora_alpha": [8, 16],
        "sculpt_density": 2,
        "learning_rate": "fast",
        "report_to": ["tensorbord", "wandb"],
    }
    file.write_text(yaml.safe_dump(wrong | {"eval_strategy": "steps", "evaluation_strategy": "steps"}))
    assert main(["--config", str(file)]) == 2
    errors = capsys.readouterr().err
    for words in (
        "unknown key lora_rank",
        "sculpt_density",
        "learning_rate",
        "lora_alpha: takes one value, got 8 16",
        "unknown 'tensorbord'; did you mean tensorboard?",
        "wandb is not installed here: pip install wandb",
        "eval_strategy: needs held-out samples",
        "evaluation_strategy is not used here (use --eval_strategy",
    ):
        assert words in errors, words


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--output_dir", "my", "dir"], "output_dir: takes one value, got my dir"),
        (["--seed", "3", "4"], "seed: takes one value, got 3 4"),
        (["--seed", "3", "--seed=4"], "seed: given twice"),
        (["--seed", "-1"], "seed: must be in [0, 4294967295], got -1"),
        (["--output_dir"], "output_dir: needs a value"),
        (["--weight_decay", "-5"], "weight_decay: must not be negative"),
        (["--max_grad_norm", "nan"], "max_grad_norm: must be finite, got nan"),
        (["--max_steps", "0"], "max_steps: must be -1 or at least 1, got 0"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint: not supported: a run continues from the last"),
        (["--save_only_model", "true"], "save_only_model: not supported: a run that is continued would end otherwise"),
        (["--ignore_data_skip"], "ignore_data_skip: not supported"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor: not supported: the loss would compare every"),
        (["--deepspeed", "{}x"], "--deepspeed: not valid JSON"),
        (["--deepspeed", '{"zero_optimization": {"stage": "2"}}'], "zero_optimization.stage: input should be"),
        (["--deepspeed", '{"optimizer": {}}'], "optimizer: must not be there"),
        (["--lr_scheduler_kwargs", "abc"], "lr_scheduler_kwargs: takes a mapping"),
    ],
)
def test_command_lines_are_taken_as_they_are_written(words: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(["--model_name_or_path", "x", *words], elsewhere=True)
    assert len(caught.value.problems) == 1 and problem in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lora_r: [8]", "lora_r: takes one value, got 8"),
        ("lora_r: 8\nlora_r: 4", "line 3, column 1: the key lora_r is given twice"),
        ("lora_r: null", "lora_r: must be a whole number, got None"),
        ("output_dir: 2026", "output_dir: must be text, got 2026 (in YAML: put it in quotes)"),
        ("seed: 1:30", "seed: must be a whole number, got '1:30'"),
        ("mm_projector_lr: .inf", "mm_projector_lr: must be finite, got inf"),
        ("lora_r: " + "[" * 5000, "nested too deeply"),
        ("<<: {lora_r: 8}", "unknown key <<"),
        ("lora_r: !!int 8", "the tag tag:yaml.org,2002:int is not known here"),
        ("x: &x [*x]", "an alias inside what it stands for"),
        (
            "\n".join(["x0: &x0 [1]", *(f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]" for i in range(9))]),
            "more than 20,000 values with the aliases put in",
        ),
    ],
)
def test_yaml_means_what_it_shows(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model_name_or_path: x\n{text}\n")
    with pytest.raises(UserError) as caught:
        parse_config(["--config", str(file)], elsewhere=True)
    assert problem in caught.value.problems[0] and str(file) in caught.value.problems[0], caught.value.problems


def test_what_is_no_file_of_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"run_name: caf\xe9")
    for name, problem in (
        (tmp_path / "pipe", "a pipe or device"),
        (tmp_path, "a folder"),
        (tmp_path / "latin", "cannot be read"),
        ("/dev/zero", "a pipe or device"),
    ):
        with pytest.raises(UserError, match=problem):
            parse_config(["--config", str(name)], elsewhere=True)


def test_optimizer_schedule_and_launcher_are_tried_first(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**flags, "output_dir": str(tmp_path / "run")}
    for name, value, problem in (
        ("lr_scheduler_kwargs", '{"no_such": 1}', "no_such"),
        ("lr_scheduler_type", "warmup_stable_decay", "num_decay_steps"),
        ("optim", "galore_adamw", "GaLore"),
        ("optim_args", "x", "not enough values"),
    ):
        with pytest.raises(UserError, match=problem):
            parse_config([f"--{key}={text}" for key, text in {**given, name: value}.items()])
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UserError, match="WORLD_SIZE: must be a whole number"):
        parse_config([f"--{key}={text}" for key, text in given.items()])


def test_a_run_that_failed_before_a_checkpoint_does_not_own_its_folder(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise UserError("no room for the model")

    with monkeypatch.context() as patch:
        patch.setattr(entry, "build_trainer", fail)
        assert train(tmp_path / "run") == 2
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train(tmp_path / "run", lora_r=4, max_steps=6) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["lora_r"] == 4
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_broken_weights_are_told_before_training(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_checkpoint(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert train(tmp_path / "run", model_name_or_path=base) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folders_that_hold_something_else(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.png").write_bytes(b"meow")
    assert train(folder) == 2
    assert "not empty" in capsys.readouterr().err
    assert {file.name for file in folder.iterdir()} == {"cat.png"}

    assert train(folder / "cat.png" / "run") == 2  # as a folder without write permission
    assert "cannot be made" in capsys.readouterr().err

    for name in (".lock", f".run.json.abc{WRITING}"):  # left by a kill before run.json was there
        (tmp_path / "killed" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "killed" / name).write_bytes(b"{")
    assert train(tmp_path / "killed", max_steps=6) == 0
    assert not list((tmp_path / "killed").glob(".*"))


def test_resume_on_another_base_is_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", max_steps=6, save_steps=2) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert train(tmp_path / "run", max_steps=6, save_steps=2, model_name_or_path=other) == 2
    assert "holds another run" in capsys.readouterr().err


def test_full_disk(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path / "whole", max_steps=8, save_steps=3) == 0
    capsys.readouterr()

    def no_room_for_the_second(source: Path, target: Path, replace=os.replace) -> None:
        if Path(target).name == "checkpoint-6":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("llava_sculpt.train.run_folder.os.replace", no_room_for_the_second)
        assert train(tmp_path / "run", max_steps=8, save_steps=3) == 2
    message = capsys.readouterr().err
    assert "No space left" in message and "checkpoint of step 6" in message
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    assert train(tmp_path / "run", max_steps=8, save_steps=3) == 0
    assert same_files(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("place", ["model.adapter.write_tensors", "model.whole.write_json"])
def test_full_disk_at_the_end(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write = write_tensors if place.endswith("write_tensors") else write_json

    def no_room(file: Path, content: Any) -> None:
        if file.parent == tmp_path / "run":
            raise OSError(28, "No space left on device")
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(f"llava_sculpt.{place}", no_room)
        assert train(tmp_path / "run", max_steps=6) == 2
    message = capsys.readouterr().err
    assert "could not save the finished run" in message and "same command again" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    assert train(tmp_path / "run", max_steps=6) == 0
    assert "step 6: resumed from" in capsys.readouterr().out
    assert (tmp_path / "run" / "README.md").exists()

    (tmp_path / "run" / CONNECTOR_FILE).unlink()
    assert train(tmp_path / "run", max_steps=6) == 2
    assert "the finished run is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["sculpt", "lora", "l2"])
def test_training_that_diverges_stops(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    options = {"method": method, "connector": "full", "learning_rate": 1e25, "save_steps": 1}
    assert train(tmp_path / "run", **options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "is not finite" in errors[0] and "learning rate" in errors[0], errors
    last = re.search(r"The last checkpoint before it is (\S+);", errors[0])
    assert last, errors
    assert all(bool(value.isfinite().all()) for value in load_file(Path(last[1]) / ADAPTER_FILE).values())
    assert not (tmp_path / "run" / ADAPTER_FILE).exists()


@pytest.mark.parametrize(
    ("moment", "number"), [("imports", signal.SIGINT), ("loading", signal.SIGTERM), ("second", signal.SIGINT)]
)
def test_ends_in_one_line_wherever_it_is_interrupted(
    flags: dict[str, str], tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    given = {**flags, "output_dir": str(folder), "num_train_epochs": "300", "logging_steps": "1000"}
    command = [sys.executable, "-m", "llava_sculpt.train.train"]
    command += [word for key, value in given.items() for word in (f"--{key}", value)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    if moment == "imports":
        time.sleep(0.5)
    elif moment == "loading":
        while not (folder / "run.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
    else:
        assert "engine:" in process.stdout.readline()
        process.send_signal(number)
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "again" in errors and errors.strip().count("\n") <= 3, errors


def test_ctrl_c_leaves_a_state_to_continue(flags: dict[str, str], tmp_path: Path) -> None:
    """The real command, interrupted as a terminal does it."""
    folder = tmp_path / "run"
    given = {**flags, "output_dir": str(folder), "num_train_epochs": "30", "save_steps": "1", "save_total_limit": "2"}
    command = [sys.executable, "-m", "llava_sculpt.train.train"]
    command += [word for key, value in given.items() for word in (f"--{key}", value)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 120
    while not list(folder.glob("checkpoint-*")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "\r" not in errors and "warning" not in errors.lower()  # stderr is no terminal, and says nothing else
    assert "Traceback" not in errors and "give the same command again" in errors
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert list(folder.glob("checkpoint-*"))


def test_gpu_that_is_too_small_is_told_before_loading(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "gpu_memory", lambda: 1_000_000)
    assert train(tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "per GPU and the GPU has" in message and "--ignore_plan" in message
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", ignore_plan=True, max_steps=6) == 0
