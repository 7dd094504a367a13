"""Both front ends train the same thing; the patched one keeps its promises under a real ZeRO-2 engine."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_sculpt.model.files import ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE
from llava_sculpt.model.layout import key_of_original
from llava_sculpt.train.train import main as train_main
from tests.llava_patch.conftest import ROOT, TINY

pytestmark = pytest.mark.slow
STEPS, MASK_STEP = 8, 4
COMMON = {
    "lora_r": "8",
    "lora_alpha": "16",
    "lora_dropout": "0",
    "max_steps": str(STEPS),
    "learning_rate": "5e-3",
    "mm_projector_lr": "1e-3",
    "sculpt_alpha": "0.1",
    "sculpt_warmup_steps": str(MASK_STEP),
    "logging_steps": "1",
    "model_max_length": "512",
    "disable_tqdm": "True",
    "report_to": "none",
}
ZERO2 = {"deepspeed": str(ROOT / "configs" / "zero2.json")}
CONNECTOR_BIN = "non_lora_trainables.bin"

Original = Callable[..., str]


@pytest.fixture(scope="module")
def original(llava_python: Path, original_checkpoint: Path, even_data: Path) -> Original:
    """`original(output_dir, launcher, **flags)` runs the patched front end; returns its output."""
    flags = {
        **COMMON,
        "lora_enable": "True",
        "model_name_or_path": str(original_checkpoint),
        "version": "v1",
        "data_path": str(even_data / "train.json"),
        "image_folder": str(even_data / "images"),
        "vision_tower": str(original_checkpoint / "vision_tower"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": "-2",
        "mm_use_im_patch_token": "False",
        "image_aspect_ratio": "pad",
        "lazy_preprocess": "True",
        "warmup_ratio": "0.03",
        "lr_scheduler_type": "cosine",
        "save_steps": "1000",
    }
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # DeepSpeed compiles an operator once for each version of it; the two environments have different ones.
        "TORCH_EXTENSIONS_DIR": str(llava_python.parents[1] / "torch_extensions"),
        "PATH": f"{llava_python.parent}:{os.environ['PATH']}",
    }

    def run(output_dir: Path, launcher: str = "python", code: int | None = 0, **given: object) -> str:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        command = {
            "python": [str(llava_python)],
            "torchrun": [str(llava_python), *"-m torch.distributed.run --nproc_per_node 2 --master_port".split(), port],
            "deepspeed": [str(llava_python.parent / "deepspeed"), "--num_gpus", "2", "--master_port", port],
        }[launcher]
        words = {**flags, "output_dir": str(output_dir), **{k: str(v) for k, v in given.items()}}
        done = subprocess.run(
            [*command, str(ROOT / "tests" / "llava_patch" / "probe.py")]
            + [word for key, value in words.items() for word in (f"--{key}", value)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
            check=False,
        )
        assert code is None or done.returncode == code, done.stdout[-6000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def zero2(original: Original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes under DeepSpeed, with the checkpoint of every step."""
    folder = tmp_path_factory.mktemp("patched") / "zero2"
    flags = {**ZERO2, "per_device_train_batch_size": 8, "save_steps": 1, "save_total_limit": 20}
    output = original(folder, "deepspeed", **flags)
    assert "engine: DeepSpeedEngine, 2 process(es), device cpu" in output
    return folder


@pytest.fixture(scope="module")
def plain(original: Original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patched") / "plain"
    original(folder, per_device_train_batch_size=16, save_steps=1, save_total_limit=20)
    return folder


@pytest.fixture(scope="module")
def ours(even_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run through the main front end."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    data = {"data_path": str(even_data / "train.json"), "image_folder": str(even_data / "images")}
    flags = {**COMMON, **data, "model_name_or_path": str(TINY), "output_dir": str(folder)}
    flags |= {"per_device_train_batch_size": "16", "warmup_steps": "0.03"}
    assert train_main([word for key, value in flags.items() for word in (f"--{key}", value)]) == 0
    return folder


def log_of(folder: Path) -> list[dict[str, float]]:
    state = folder / "trainer_state.json"
    return [record for record in json.loads(state.read_text())["log_history"] if "loss" in record]


def connector_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / CONNECTOR_BIN, weights_only=True)


def assert_same_run(theirs: Path, ours: Path) -> None:
    """Task loss, regularizer and density of every step; masks, adapter and connector at the end."""
    logs = list(zip(log_of(theirs), log_of(ours), strict=True))
    assert len(logs) == STEPS
    assert logs[0][0]["task_loss"] == pytest.approx(logs[0][1]["task_loss"], abs=1e-4)
    for mine, other in logs:
        assert mine["task_loss"] == pytest.approx(other["task_loss"], abs=1e-3)
        assert mine["cmr_llm"] == pytest.approx(other["cmr_llm"], rel=1e-3, abs=1e-7)
        assert mine["density"] == pytest.approx(other["density"], abs=1e-4)
    assert logs[-1][0]["task_loss"] < logs[0][0]["task_loss"] - 1  # it trains
    masks, own_masks = load_file(theirs / MASKS_FILE), load_file(ours / MASKS_FILE)
    masks = {key_of_original(key): value for key, value in masks.items()}
    assert masks.keys() == own_masks.keys()
    # Rounding decides between entries of nearly equal magnitude.
    different = sum(int((masks[key] != own_masks[key]).sum()) for key in masks)
    assert different <= 1e-3 * sum(int(mask.sum()) for mask in masks.values())
    saved, own = load_file(theirs / ADAPTER_FILE), load_file(ours / ADAPTER_FILE)
    saved = {key_of_original(key): value for key, value in saved.items()}
    assert saved.keys() == own.keys()
    for key, mask in masks.items():
        assert (saved[key] - own[key])[mask & own_masks[key]].abs().max() <= 1e-3
    connector = {key_of_original(key): value for key, value in connector_of(theirs).items()}
    expected = load_file(ours / CONNECTOR_FILE)
    assert {key.removeprefix("base_model.model.") for key in connector} == expected.keys()
    for key, value in connector.items():
        reference = expected[key.removeprefix("base_model.model.")]
        assert (value - reference).norm() <= 1e-4 * reference.norm()
        assert (value - reference).abs().max() <= 5e-4


def test_one_process_trains_what_the_main_front_end_trains(plain: Path, ours: Path) -> None:
    assert_same_run(plain, ours)


def test_two_processes_under_zero2_train_what_the_main_front_end_trains(zero2: Path, ours: Path) -> None:
    assert_same_run(zero2, ours)


@pytest.mark.parametrize(("run", "processes"), [("plain", 1), ("zero2", 2)])
def test_rates_clipping_and_masks(request: pytest.FixtureRequest, run: str, processes: int) -> None:
    """The scheduled rate for every group at every step; nothing off the masks in any copy."""
    folder = request.getfixturevalue(run)
    for rank in range(processes):
        found = json.loads((folder.parent / f"probe-{folder.name}-{rank}.json").read_text())
        if run == "zero2":
            assert (found["engine"], found["stage"], found["clipping"]) == ("DeepSpeedEngine", 2, 1.0)
        assert len(found["steps"]) == STEPS
        for index, step in enumerate(found["steps"]):
            share = 0.0 if index == 0 else 0.5 * (1 + math.cos(math.pi * (index - 1) / (STEPS - 1)))
            # LoRA; the connector's weights; its biases.
            assert step["rates"] == pytest.approx([5e-3 * share, 1e-3 * share, 1e-3 * share], rel=1e-9)
            assert step["off_mask"] == 0


@pytest.mark.parametrize("run", ["plain", "zero2"])
def test_checkpoints_are_complete(request: pytest.FixtureRequest, run: str) -> None:
    folder = request.getfixturevalue(run)
    for step in range(1, STEPS + 1):
        checkpoint = folder / f"checkpoint-{step}"
        weights = load_file(checkpoint / ADAPTER_FILE)
        assert len(connector_of(checkpoint)) == 4
        assert (checkpoint / MASKS_FILE).exists() == (step > MASK_STEP)
        if step > MASK_STEP:
            masks = load_file(checkpoint / MASKS_FILE)
            assert not any(weights[key].masked_select(~mask).any() for key, mask in masks.items())
    last = folder / f"checkpoint-{STEPS}"
    assert (folder / MASKS_FILE).read_bytes() == (last / MASKS_FILE).read_bytes()
    final, expected = load_file(folder / ADAPTER_FILE), load_file(last / ADAPTER_FILE)
    assert all(torch.equal(final[key], expected[key]) for key in expected)


def cut_off_after(step: int, whole: Path, folder: Path) -> Path:
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.mark.parametrize(("run", "step"), [("plain", MASK_STEP), ("plain", MASK_STEP + 1), ("zero2", MASK_STEP + 1)])
def test_resumed_equals_uninterrupted(
    original: Original, request: pytest.FixtureRequest, tmp_path: Path, run: str, step: int
) -> None:
    whole = request.getfixturevalue(run)
    folder = cut_off_after(step, whole, tmp_path / "cut")
    if run == "plain":
        original(folder, per_device_train_batch_size=16)
    else:
        original(folder, "deepspeed", **ZERO2, per_device_train_batch_size=8)
    for name in (ADAPTER_FILE, MASKS_FILE, CONNECTOR_BIN):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert [r["task_loss"] for r in log_of(folder)] == [r["task_loss"] for r in log_of(whole)]


def test_resume_without_its_masks_is_refused(original: Original, plain: Path, tmp_path: Path) -> None:
    folder = cut_off_after(MASK_STEP + 1, plain, tmp_path / "cut")
    output = original(folder, code=2, per_device_train_batch_size=16, sculpt_density=0.2)
    assert "made for another density than 0.2" in output
    (folder / f"checkpoint-{MASK_STEP + 1}" / MASKS_FILE).unlink()
    output = original(folder, code=2, per_device_train_batch_size=16)
    assert "missing, but step 5 is after the mask step 4" in output and "Traceback" not in output


@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_gradient_accumulation_cancels(original: Original, plain: Path, tmp_path: Path, launcher: str) -> None:
    processes = 2 if launcher == "deepspeed" else 1
    engine = ZERO2 if launcher == "deepspeed" else {}
    split = {"per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2}
    original(tmp_path / "split", launcher, **engine, **split)
    for mine, other in zip(log_of(tmp_path / "split"), log_of(plain), strict=True):
        assert mine["task_loss"] == pytest.approx(other["task_loss"], abs=1e-4)
        assert mine["cmr_llm"] == pytest.approx(other["cmr_llm"], rel=1e-4, abs=1e-7)


def test_torchrun_without_deepspeed(original: Original, plain: Path, tmp_path: Path) -> None:
    output = original(tmp_path / "ddp", "torchrun", per_device_train_batch_size=8)
    assert "engine: DistributedDataParallel, 2 process(es)" in output
    for mine, other in zip(log_of(tmp_path / "ddp"), log_of(plain), strict=True):
        assert mine["task_loss"] == pytest.approx(other["task_loss"], abs=1e-4)


def test_plain_lora(original: Original, plain: Path, tmp_path: Path) -> None:
    original(tmp_path / "lora", per_device_train_batch_size=16, method="lora")
    log = log_of(tmp_path / "lora")
    assert log[0]["task_loss"] == pytest.approx(log_of(plain)[0]["task_loss"], abs=1e-5)
    assert "cmr_llm" not in log[0] and not (tmp_path / "lora" / MASKS_FILE).exists()


def test_what_cannot_be_honoured_is_refused_at_once(original: Original, tmp_path: Path) -> None:
    flags = {"lora_enable": "False", "sculpt_density": "2", "lora_bias": "all", "method": "dora"}
    output = original(tmp_path / "bad", code=2, **flags)
    for words in (
        "lora_enable: must be True",
        "density: must be in (0, 1]",
        "lora_bias: must be none",
        "main front end",
    ):
        assert words in output
    assert "Traceback" not in output and not (tmp_path / "bad").exists()
    output = original(tmp_path / "bad", "torchrun", code=None, **ZERO2, use_cpu="True")
    assert "use_cpu: leave it out with --deepspeed" in output
    output = original(tmp_path / "bad", "torchrun", code=None, deepspeed=ROOT / "configs" / "zero3.json")
    assert "zero_optimization.stage must be 2 here, got 3" in output
    output = original(tmp_path / "bad", code=2, forgetting_probe=8)
    assert "forgetting_probe: works in the main front end only" in output
    assert "start it with the deepspeed launcher" in original(tmp_path / "bad", code=2, **ZERO2)
