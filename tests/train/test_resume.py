"""A run that was cut off and continued is, bit for bit, the run that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_sculpt.model.files import ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE, write_tensors
from llava_sculpt.train import train as entry
from tests.runs import Train, cut_off_after, log_of, same_files

pytestmark = pytest.mark.gpu

STEPS, MASK_STEP = 18, 5


@pytest.fixture(scope="module")
def with_checkpoints(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "whole"
    assert train(folder, save_steps=1, save_total_limit=100) == 0
    return folder


# Before, at and after the mask step; in the middle of an epoch and at its end (6 steps each).
@pytest.mark.parametrize("step", [1, MASK_STEP - 1, MASK_STEP, MASK_STEP + 1, 6, 12, 15, STEPS])
def test_resumed_equals_uninterrupted(train: Train, with_checkpoints: Path, tmp_path: Path, step: int) -> None:
    folder = cut_off_after(step, with_checkpoints, tmp_path / "run")
    assert train(folder) == 0
    assert same_files(folder, with_checkpoints)
    assert [r["loss"] for r in log_of(folder)] == [r["loss"] for r in log_of(with_checkpoints)]
    assert not (folder / ".saving").exists()


def test_finished_run_is_left_alone(train: Train, with_checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (with_checkpoints / ADAPTER_FILE).stat().st_mtime_ns
    assert train(with_checkpoints) == 0
    assert "already finished" in capsys.readouterr().out
    assert (with_checkpoints / ADAPTER_FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_r": 4}, "lora_r: 8 there, 4 now"),
        ({"sculpt_density": 0.2}, "sculpt_density: 0.1 there, 0.2 now"),
        ({"seed": 7}, "seed: 42 there, 7 now"),
        ({"per_device_train_batch_size": 2}, "global_batch_size: 4 there, 2 now"),
    ],
)
def test_another_run_is_refused(
    train: Train, with_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, words: str
) -> None:
    folder = cut_off_after(7, with_checkpoints, tmp_path / "run")
    assert train(folder, **change) == 2
    message = capsys.readouterr().err
    assert "holds another run" in message and words in message
    assert (folder / "checkpoint-7").is_dir()


def complete(folder: Path) -> None:
    """Make the marker agree with what is in the checkpoint now, as versions did that recorded sizes."""
    sizes = {f.name: f.stat().st_size for f in folder.iterdir() if f.name != "complete.json"}
    (folder / "complete.json").write_text(json.dumps(sizes))


def test_missing_foreign_and_damaged_files_are_refused(
    train: Train, with_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, words: str) -> None:
        assert train(tmp_path / name) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert [words in line for line in errors if line.startswith("error:")] == [True], errors

    checkpoint = cut_off_after(7, with_checkpoints, tmp_path / "missing") / "checkpoint-7"
    (checkpoint / MASKS_FILE).unlink()
    refused("missing", f"{MASKS_FILE} is missing")
    complete(checkpoint)
    refused("missing", "is after the mask step")

    checkpoint = cut_off_after(7, with_checkpoints, tmp_path / "foreign") / "checkpoint-7"
    masks = load_file(checkpoint / MASKS_FILE)
    moved = {k: m.flatten().roll(1).view(m.shape).contiguous() for k, m in masks.items()}
    write_tensors(checkpoint / MASKS_FILE, moved)
    refused("foreign", f"{MASKS_FILE}: damaged or changed")
    complete(checkpoint)
    refused("foreign", "does not belong to")
    write_tensors(checkpoint / MASKS_FILE, {k: torch.ones_like(m) for k, m in masks.items()})
    refused("foreign", "another density")
    write_tensors(checkpoint / MASKS_FILE, {k: m[:4].contiguous() for k, m in masks.items()})
    complete(checkpoint)
    refused("foreign", "another model or rank")

    checkpoint = cut_off_after(7, with_checkpoints, tmp_path / "truncated") / "checkpoint-7"
    (checkpoint / ADAPTER_FILE).write_bytes((checkpoint / ADAPTER_FILE).read_bytes()[:-10])
    refused("truncated", f"{ADAPTER_FILE}: damaged or changed")
    complete(checkpoint)
    refused("truncated", ADAPTER_FILE)

    checkpoint = cut_off_after(7, with_checkpoints, tmp_path / "extra") / "checkpoint-7"
    (checkpoint / "optimizer.bin").write_bytes(b"")
    refused("extra", "optimizer.bin was not written with it")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_zeroed_files_of_an_older_version_are_refused_in_one_message(
    train: Train, with_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    checkpoint = cut_off_after(7, with_checkpoints, tmp_path / "run") / "checkpoint-7"
    (checkpoint / name).write_bytes(bytes((checkpoint / name).stat().st_size))
    complete(checkpoint)
    assert train(tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "checkpoint-7" in message and "weights_only" not in message


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", CONNECTOR_FILE, "rng_state.pth"])
def test_files_that_vanish_after_the_check_are_not_skipped(
    train: Train,
    with_checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    folder = cut_off_after(7, with_checkpoints, tmp_path / "run")
    build = entry.build_trainer

    def build_and_delete(*args: Any) -> Any:
        (folder / "checkpoint-7" / name).unlink()
        return build(*args)

    monkeypatch.setattr(entry, "build_trainer", build_and_delete)
    assert train(folder) == 2
    assert f"{name} changed or vanished" in capsys.readouterr().err


def test_changed_inputs_are_refused(
    train: Train, flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, images = tmp_path / "base", tmp_path / "images"
    shutil.copytree(flags["model_name_or_path"], base)
    shutil.copytree(flags["image_folder"], images)
    given = {"model_name_or_path": base, "image_folder": images}
    assert train(tmp_path / "whole", max_steps=6, save_steps=3, save_total_limit=9, **given) == 0
    folder = cut_off_after(3, tmp_path / "whole", tmp_path / "run")

    picture, preprocessor = images / "1.png", base / "preprocessor_config.json"
    before = picture.read_bytes()
    Image.new("RGB", Image.open(picture).size).save(picture)
    assert train(folder, max_steps=6, **given) == 2
    assert "images changed since the run began" in capsys.readouterr().err
    picture.write_bytes(before)
    before = preprocessor.read_bytes()
    preprocessor.write_text(before.decode().replace("0.48145466", "0.5"))
    assert train(folder, max_steps=6, **given) == 2
    assert "preprocessor changed since the run began" in capsys.readouterr().err
    preprocessor.write_bytes(before)

    record = json.loads((folder / "run.json").read_text())
    del record["inputs"]  # as in runs of an older version
    (folder / "run.json").write_text(json.dumps(record))
    assert train(folder, max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, **given) == 0
    assert "was 4 x 1 x 1, is now 2 x 2 x 1" in capsys.readouterr().out


def test_two_commands_on_one_folder(flags: dict[str, str], with_checkpoints: Path, tmp_path: Path) -> None:
    """The second is refused in one line while the first trains, whose result is right."""
    given = {**flags, "output_dir": str(tmp_path / "run")}
    command = [sys.executable, "-m", "llava_sculpt.train.train"]
    command += [word for key, value in given.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 2], [0, 0]), errors
    for process, text in zip(both, errors, strict=True):
        assert process.returncode == 0 or text.count("error:") == text.count("another process is at work") == 1, text
    assert same_files(tmp_path / "run", with_checkpoints)


@pytest.mark.slow
def test_killed_at_any_moment(flags: dict[str, str], with_checkpoints: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, until the run gets through; the real command in its own process."""
    folder = tmp_path / "run"
    given = {**flags, "output_dir": str(folder), "save_steps": "1", "save_total_limit": "2"}
    command = [sys.executable, "-m", "llava_sculpt.train.train"]
    command += [word for key, value in given.items() for word in (f"--{key}", value)]
    rng, kills = random.Random(0), 0
    # torch must compute as in this process to give the same bits
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(60):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        if kills < 8:
            deadline = time.time() + 120
            seen = len(list(folder.glob("checkpoint-*")))
            while time.time() < deadline and process.poll() is None and len(list(folder.glob("checkpoint-*"))) <= seen:
                time.sleep(0.02)
                seen = min(seen, 1)
            time.sleep(rng.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        if process.returncode == 0:
            break
    assert same_files(folder, with_checkpoints, (ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE))
