"""The real launchers: DeepSpeed ZeRO-2 and torchrun with two processes train what one process trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llava_sculpt.model.adapter import ADAPTER_FILE, MASKS_FILE

ROOT = Path(__file__).parents[2]
ENTRY = str(ROOT / "llava_sculpt" / "train" / "train.py")
BIN = Path(sys.executable).parent


def launch(command: list[str], flags: dict[str, str], output_dir: Path) -> None:
    given = {**flags, "output_dir": str(output_dir), "max_steps": "8", "lora_dropout": "0"}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run([*command, ENTRY, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", "zero2"])
def test_two_processes_train_what_one_trains(flags: dict[str, str], tmp_path: Path, engine: str) -> None:
    if engine == "zero2" and (find_spec("deepspeed") is None or shutil.which("deepspeed", path=str(BIN)) is None):
        pytest.skip("needs deepspeed")
    launch([sys.executable], {**flags, "per_device_train_batch_size": "4"}, tmp_path / "one")
    two = {**flags, "per_device_train_batch_size": "2"}
    if engine == "zero2":
        two["deepspeed"] = str(ROOT / "configs" / "zero2.json")
        command = [str(BIN / "deepspeed"), "--num_accelerators", "2"]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch(command, two, tmp_path / "two")
    one, other = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("one", "two"))
    masks = load_file(tmp_path / "two" / MASKS_FILE)
    assert one.keys() == other.keys() == masks.keys()
    for key in one:
        assert not other[key][~masks[key]].any()
        assert (one[key] - other[key]).abs().max() <= 1e-5
