"""The real launchers and engines: however a run is split over processes, it is the same run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionModel, LlavaConfig

from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.files import ADAPTER_FILE
from llava_sculpt.model.load import load_base
from tests.runs import (
    ACCELERATE,
    DEEPSPEED,
    PYTHON,
    ROOT,
    TORCHRUN,
    assert_exact,
    assert_same_run,
    cut_off_after,
    free_port,
    launch,
    log_of,
    needs_deepspeed,
    probe_of,
    same_files,
    start,
    zero,
)

MASK_STEP = 5


@pytest.fixture(scope="module")
def flags(flags: dict[str, str], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With another vision tower, which ZeRO-3 must have too."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tower") / "clip"
    CLIPVisionModel(LlavaConfig.from_pretrained(checkpoint).vision_config).save_pretrained(folder)
    return {**flags, "vision_tower": str(folder)}


@pytest.fixture(scope="module")
def one(flags: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "one"
    launch(PYTHON, {**flags, "per_device_train_batch_size": "8"}, folder)
    return folder


# DeepSpeed's two stages with accumulated gradients are in `make test`, the other ways in `make test-slow`.
ENGINES = {
    "torchrun-ddp": (TORCHRUN, {}, "DistributedDataParallel", None),
    "accelerate-ddp": (ACCELERATE, {}, "DistributedDataParallel", None),
    "zero2": (DEEPSPEED, zero("zero2"), "DeepSpeedEngine", 2),
    "zero3": (DEEPSPEED, zero("zero3"), "DeepSpeedEngine", 3),
    "zero3-offload": (DEEPSPEED, zero("zero3_offload"), "DeepSpeedEngine", 3),
    "torchrun-zero3": (TORCHRUN, zero("zero3"), "DeepSpeedEngine", 3),
}
CASES = [
    pytest.param(
        *engine,
        accumulation,
        id=f"{accumulation}-{name}",
        marks=[
            *([needs_deepspeed] if "deepspeed" in engine[1] else []),
            *([] if name in ("zero2", "zero3") and accumulation == 4 else [pytest.mark.slow]),
        ],
    )
    for accumulation in (1, 4)
    for name, engine in ENGINES.items()
]


@pytest.mark.parametrize(("command", "engine_flags", "engine", "stage", "accumulation"), CASES)
def test_two_processes_train_what_one_trains(
    flags: dict[str, str],
    one: Path,
    tmp_path: Path,
    command: list[str],
    engine_flags: dict[str, str],
    engine: str,
    stage: int | None,
    accumulation: int,
) -> None:
    split = {
        "per_device_train_batch_size": str(4 // accumulation),
        "gradient_accumulation_steps": str(accumulation),
    }
    held_out = {"eval_strategy": "steps", "eval_steps": "4", "eval_data_path": flags["data_path"]}
    output = launch(command, {**flags, **engine_flags, **split, **held_out}, tmp_path / "two")
    assert f"engine: {engine}, 2 process(es)" in output
    for words in (f"step {MASK_STEP}: made the masks of", "8/8  held-out loss", "next     llava-sculpt eval"):
        assert output.count(words) == 1, words  # by one process
    assert (probe_of(tmp_path / "two")["engine"], probe_of(tmp_path / "two")["zero_stage"]) == (engine, stage)
    assert_same_run(tmp_path / "two", one)
    assert_exact(tmp_path / "two", 2)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_one_process_trains_the_same_however_a_step_is_split(
    flags: dict[str, str], one: Path, tmp_path: Path, accumulation: int
) -> None:
    split = {
        "per_device_train_batch_size": str(8 // accumulation),
        "gradient_accumulation_steps": str(accumulation),
    }
    launch(PYTHON, {**flags, **split}, tmp_path / "split")
    assert_same_run(tmp_path / "split", one)
    assert_exact(tmp_path / "split", 1)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_bf16_holds_the_masks_in_every_copy(flags: dict[str, str], one: Path, tmp_path: Path, stage: str) -> None:
    options = {**flags, **zero(stage), "per_device_train_batch_size": "4", "bf16": "True"}
    launch(DEEPSPEED, options, tmp_path / "bf16")
    assert_exact(tmp_path / "bf16", 2)
    assert load_file(tmp_path / "bf16" / ADAPTER_FILE).keys() == load_file(one / ADAPTER_FILE).keys()
    for mine, other in zip(log_of(tmp_path / "bf16"), log_of(one), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-2)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_text_only_micro_batch_on_one_process(flags: dict[str, str], tmp_path: Path, stage: str) -> None:
    mixed = {**flags, "group_by_modality_length": "False"}
    launch(PYTHON, {**mixed, "per_device_train_batch_size": "2"}, tmp_path / "one")
    launch(DEEPSPEED, {**mixed, **zero(stage), "per_device_train_batch_size": "1"}, tmp_path / "two")
    images = [[step["images"] for step in probe_of(tmp_path / "two", rank)["steps"]] for rank in (0, 1)]
    assert any(a != b for a, b in zip(*images, strict=True)), "no step with an image on one process alone"
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_connector_regularizer(flags: dict[str, str], tmp_path: Path, stage: str) -> None:
    options = {**flags, "connector": "sculpt", "sculpt_beta": "1e-2"}
    launch(PYTHON, {**options, "per_device_train_batch_size": "4"}, tmp_path / "one")
    launch(DEEPSPEED, {**options, **zero(stage), "per_device_train_batch_size": "2"}, tmp_path / "two")
    for mine, other in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["cmr_connector"] == pytest.approx(other["cmr_connector"], rel=1e-4, abs=1e-7)
    assert log_of(tmp_path / "two")[-1]["cmr_connector"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "engine_flags"),
    [
        pytest.param(TORCHRUN, {}, id="ddp"),
        pytest.param(DEEPSPEED, zero("zero2"), id="zero2", marks=needs_deepspeed),
        pytest.param(DEEPSPEED, zero("zero3"), id="zero3", marks=needs_deepspeed),
    ],
)
@pytest.mark.parametrize("method", ["dora", "l2", "orth"])
def test_baselines(
    flags: dict[str, str], tmp_path: Path, method: str, command: list[str], engine_flags: dict[str, str]
) -> None:
    options = {**flags, "method": method, "reg_lambda": "0.02"}
    if engine_flags == zero("zero3"):
        # As with large matrices: nothing stays gathered after its module has run, W for DoRA's norms included.
        config = json.loads((ROOT / "configs" / "zero3.json").read_text())
        for key in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
            config["zero_optimization"][f"stage3_{key}"] = 0
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        engine_flags = {"deepspeed": str(tmp_path / "zero3.json")}
    two = {**options, **engine_flags, "per_device_train_batch_size": "2"}
    if method == "orth" and (tmp_path / "zero3.json").exists():
        output = launch(command, two, tmp_path / "two", code=None)
        assert "method: orth does not go with ZeRO-3" in output and "Traceback" not in output
        assert not (tmp_path / "two").exists()
        return
    launch(command, two, tmp_path / "two")
    launch(PYTHON, {**options, "per_device_train_batch_size": "4"}, tmp_path / "one")
    for mine, other in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        if method != "dora":
            penalty = f"{method}_penalty"
            assert mine[penalty] == pytest.approx(other[penalty], rel=1e-5, abs=1e-7)
    trained, expected = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("two", "one"))
    assert trained.keys() == expected.keys()
    # Adam turns rounding in DoRA's smallest gradients into steps of their own; the losses above agree to 1e-5.
    tolerance = 1e-4 if method == "dora" else 1e-5
    assert all((trained[key] - expected[key]).abs().max() <= tolerance for key in trained)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_resumed_equals_uninterrupted(flags: dict[str, str], tmp_path: Path, stage: str) -> None:
    options = {**flags, **zero(stage), "per_device_train_batch_size": "2"}
    whole = tmp_path / "whole"
    launch(DEEPSPEED, {**options, "save_steps": "1", "save_total_limit": "100"}, whole)
    for step in (MASK_STEP - 1, MASK_STEP, MASK_STEP + 1):
        folder = cut_off_after(step, whole, tmp_path / f"cut-{step}")
        launch(DEEPSPEED, options, folder)
        assert same_files(folder, whole), f"resumed after step {step}"
        assert [r["loss"] for r in log_of(folder)] == [r["loss"] for r in log_of(whole)]

    if stage == "zero3":  # one stage shows what is refused
        return
    four = {"per_device_train_batch_size": "4"}
    for name, command, change, words in (
        ("stage", DEEPSPEED, zero("zero3"), "written by DeepSpeed ZeRO-2 with 2 processes"),
        ("processes", [*DEEPSPEED[:-1], "1"], four, "this launch is DeepSpeed"),
        ("plain", PYTHON, {**four, "deepspeed": ""}, "this launch is no DeepSpeed"),
    ):
        folder = cut_off_after(MASK_STEP, whole, tmp_path / name)
        given = {k: v for k, v in {**options, **change}.items() if v}
        output = launch(command, given, folder, code=None)
        assert words in output and "Traceback" not in output, output[-3000:]
        assert (folder / f"checkpoint-{MASK_STEP}").is_dir()


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_killed_before_at_and_after_the_mask_step(flags: dict[str, str], tmp_path: Path, stage: str) -> None:
    """SIGKILL of launcher and processes, each time soon after another checkpoint has come."""
    options = {**flags, **zero(stage), "per_device_train_batch_size": "2", "save_steps": "1", "save_total_limit": "100"}
    launch(DEEPSPEED, options, tmp_path / "whole")
    folder, rng = tmp_path / "killed", random.Random(stage)
    for step in (MASK_STEP - 2, MASK_STEP, MASK_STEP + 1):
        process = start(DEEPSPEED, options, folder)
        while not (folder / f"checkpoint-{step}").is_dir():
            assert process.poll() is None, process.communicate()[0][-6000:]
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (folder / ADAPTER_FILE).exists(), "the run ended before it was killed"
    launch(DEEPSPEED, options, folder)
    assert same_files(folder, tmp_path / "whole")
    assert [r["loss"] for r in log_of(folder)] == [r["loss"] for r in log_of(tmp_path / "whole")]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_launchers_make_one_run(flags: dict[str, str], one: Path, tmp_path: Path, launcher: str) -> None:
    """Two nodes, both on this machine."""
    port, folder = str(free_port()), tmp_path / "nodes"
    options = {**flags, **zero("zero2"), "per_device_train_batch_size": "4"}
    where = ["--master_addr", "127.0.0.1", "--master_port", port]
    if launcher == "torchrun":
        command = [*TORCHRUN[:3], "--nnodes", "2", "--nproc_per_node", "1", *where]
    else:
        (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
        command = [DEEPSPEED[0], "--hostfile", str(tmp_path / "hosts"), "--no_ssh", *where]
    nodes = [start([*command, "--node_rank", str(rank)], options, folder) for rank in (0, 1)]
    for node in nodes:
        output, _ = node.communicate(timeout=300)
        assert node.returncode == 0, output[-6000:]
    assert_same_run(folder, one)


@pytest.mark.slow
@needs_deepspeed
def test_quantised_base_is_refused_under_zero3(flags: dict[str, str], tmp_path: Path) -> None:
    output = launch(DEEPSPEED, {**flags, **zero("zero3"), "bits": "4"}, tmp_path / "run", code=None)
    assert "bits: 4 does not go with ZeRO-3" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fewer_processes_may_continue_without_deepspeed(flags: dict[str, str], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    split = {**flags, "per_device_train_batch_size": "2"}
    launch(TORCHRUN, {**split, "save_steps": "1", "save_total_limit": "100"}, whole)
    folder = cut_off_after(MASK_STEP + 1, whole, tmp_path / "fewer")
    launch(PYTHON, {**flags, "per_device_train_batch_size": "4"}, folder)
    weights, expected = load_file(folder / ADAPTER_FILE), load_file(whole / ADAPTER_FILE)
    assert all(torch.allclose(weights[key], expected[key], rtol=0, atol=1e-5) for key in expected)


@pytest.mark.slow
@needs_deepspeed
def test_engines_that_are_not_supported_are_refused(flags: dict[str, str], tmp_path: Path) -> None:
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"] |= {"stage": 1, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    (tmp_path / "zero1.json").write_text(json.dumps(config))
    options = {**flags, "deepspeed": str(tmp_path / "zero1.json")}
    output = launch(DEEPSPEED, options, tmp_path / "run", code=None)
    assert "stage must be 2 or 3, got 1" in output and "offload_param to nvme" in output
    assert "Traceback" not in output and not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_deepspeed
def test_bf16_does_not_freeze_doras_magnitudes(flags: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    """Working copies are bf16 and move in coarse steps; the float32 masters behind them add up the small ones."""
    options = {**flags, **zero("zero2"), "per_device_train_batch_size": "2", "bf16": "True", "method": "dora"}
    launch(DEEPSPEED, options, tmp_path / "run")
    trained = load_file(tmp_path / "run" / ADAPTER_FILE)
    weights = load_base(find_base_checkpoint(str(checkpoint)), torch.float32).state_dict()
    moved = []
    for key in (key for key in trained if key.endswith(".lora_magnitude_vector")):
        name = key.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")
        moved.append(trained[key].float() != weights[name].norm(dim=1).bfloat16().float())
    assert len(moved) == 14 and torch.cat(moved).float().mean() > 0.5
