"""Running the training entry point, in this process or under the real launchers, and reading what a run leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llava_sculpt.model.files import ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE, RUN_FILE
from llava_sculpt.model.whole import seal_run

Train = Callable[..., int]
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STEPS = 8  # of a run that `start` launches

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed (make setup-dev)")


def zero(name: str) -> dict[str, str]:
    return {"deepspeed": str(ROOT / "configs" / f"{name}.json")}


def start_script(command: list[str], script: str, *words: str) -> subprocess.Popen[str]:
    """A script of tests/train/ under a launcher, on a free port, in a process group of its own."""
    # DS_ACCELERATOR is not set: on a machine without a GPU there must be no variable to remember.
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    if "--master_port" not in command and command != PYTHON:
        port = "--main_process_port" if command == ACCELERATE else "--master_port"
        command = [*command, port, str(free_port())]
    return subprocess.Popen(
        [*command, str(ROOT / "tests" / "train" / script), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a launcher and its processes can be killed together
    )


def start(command: list[str], flags: dict[str, str], output_dir: Path) -> subprocess.Popen[str]:
    """A run of `STEPS` steps that notes what the engine holds (probe.py)."""
    given = {**flags, "output_dir": str(output_dir), "max_steps": str(STEPS), "lora_dropout": "0"}
    return start_script(command, "probe.py", *(word for key, value in given.items() for word in (f"--{key}", value)))


def launch(command: list[str], flags: dict[str, str], output_dir: Path, code: int | None = 0) -> str:
    process = start(command, flags, output_dir)
    output, _ = process.communicate(timeout=300)
    assert code is None or process.returncode == code, output[-6000:]
    return output


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def probe_of(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder.parent / f"probe-{folder.name}-{rank}.json").read_text())


def log_of(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def same_files(a: Path, b: Path, names: tuple[str, ...] = (ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE)) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def changed(folder: Path) -> Path:
    """A run folder whose files were changed, with a run.json that says so."""
    run = json.loads((folder / RUN_FILE).read_text())
    seal_run(folder, run)
    return folder


def cut_off_after(step: int, whole: Path, folder: Path) -> Path:
    """A run folder as a kill after `step` leaves it."""
    folder.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    record = json.loads((whole / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps({**record, "status": "running"}))
    (folder / ".saving" / f"checkpoint-{step + 1}").mkdir(parents=True)  # the kill came while saving
    (folder / ".saving" / f"checkpoint-{step + 1}" / ADAPTER_FILE).write_bytes(b"half")
    return folder


def assert_same_run(folder: Path, one: Path, tolerance: float = 1e-5) -> None:
    """Loss trajectory, logged CMR, masks, LoRA and connector."""
    ours, theirs = log_of(folder), log_of(one)
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert mine["cmr_llm"] == pytest.approx(other["cmr_llm"], rel=1e-4, abs=1e-7)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert mine["density"] == pytest.approx(other["density"], abs=1e-4)
    assert (folder / MASKS_FILE).read_bytes() == (one / MASKS_FILE).read_bytes()
    for name in (ADAPTER_FILE, CONNECTOR_FILE):
        mine_file, other_file = load_file(folder / name), load_file(one / name)
        assert mine_file.keys() == other_file.keys()
        for key in mine_file:
            assert (mine_file[key] - other_file[key]).abs().max() <= tolerance


def assert_exact(folder: Path, processes: int) -> None:
    """Nothing off the masks in any copy after any step; the scheduled rate for every group at every step."""
    weights, masks = load_file(folder / ADAPTER_FILE), load_file(folder / MASKS_FILE)
    assert not any(weights[key].masked_select(~mask).any() for key, mask in masks.items())
    for rank in range(processes):
        steps = probe_of(folder, rank)["steps"]
        assert len(steps) == STEPS
        for index, step in enumerate(steps):
            assert step["off_mask"] == 0
            # One step of warm-up, then a cosine over the other seven.
            share = 0.0 if index == 0 else 0.5 * (1 + math.cos(math.pi * (index - 1) / (STEPS - 1)))
            assert step["rates"] == {
                "lora": pytest.approx(5e-3 * share, rel=1e-9),
                "connector": pytest.approx(1e-3 * share, rel=1e-9),
            }
