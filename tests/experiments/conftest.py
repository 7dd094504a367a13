"""A repository folder in small: random LLaVA, a few samples of the tiny world, trainings of a few steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
# Eight optimizer steps with a checkpoint every two; masks before step 3.
SHORT = {
    "lora_r": 4,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 3,
    "save_steps": 2,
    "logging_steps": 2,
    "learning_rate": 1.0e-3,
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with configs/ whose trainings are short; no data."""
    return make_study(tmp_path / "study")


@pytest.fixture
def live_study(study: Path, tiny_data: Path, checkpoint: Path) -> Path:
    """The same with data and base model: `experiment` runs in it."""
    return with_data(study, tiny_data, checkpoint)


def make_study(folder: Path) -> Path:
    for part in ("configs/tiny", "configs/values", "configs/grids"):
        (folder / part).mkdir(parents=True)
    for file in (REPOSITORY / "configs" / "tiny").glob("*.yaml"):
        content = {**yaml.safe_load(file.read_text()), **SHORT}
        if content["method"] == "sculpt":
            content["sculpt_warmup_steps"] = 3
        (folder / "configs" / "tiny" / file.name).write_text(yaml.safe_dump(content))
    for name in ("paper", "tiny"):
        source = REPOSITORY / "configs" / "values" / f"{name}.yaml"
        (folder / "configs" / "values" / source.name).write_text(source.read_text())
    for file in (REPOSITORY / "configs").glob("*.yaml"):
        (folder / "configs" / file.name).write_text(file.read_text())
    for file in (REPOSITORY / "configs" / "grids").glob("*.yaml"):
        (folder / "configs" / "grids" / file.name).write_text(file.read_text())
    return folder


def with_data(study: Path, tiny_data: Path, checkpoint: Path) -> Path:
    (study / "data").mkdir()
    (study / "data" / "tiny").symlink_to(tiny_data)
    (study / "data" / "tiny_llava").symlink_to(checkpoint)
    return study


def write_grid(study: Path, name: str, entries: list[dict[str, object]], **keys: object) -> None:
    content = {"title": name, "split": "val", "tiny": entries, **keys}
    (study / "configs" / "grids" / f"{name}.yaml").write_text(yaml.safe_dump(content))


def start(study: Path, *arguments: str) -> subprocess.Popen[str]:
    """`llava-sculpt experiment ARGUMENTS` in that folder, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "llava_sculpt.cli", "experiment", *arguments, "--scale", "tiny"],
        cwd=study,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def results_of(study: Path) -> dict[str, str]:
    """Every result file without its record, by name."""
    found = {}
    for file in sorted((study / "results" / "tiny" / "runs").glob("*")):
        content = json.loads(file.read_text())
        del content["record"]
        found[file.name] = json.dumps(content, sort_keys=True)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> str:
    os.kill(process.pid, number)
    return process.communicate(timeout=60)[0]
