"""The main job: fine-tune on IconQA or COCO, evaluate what was learned and what was forgotten, show both.

`bash scripts/finetune_iconqa.sh` and `scripts/finetune_coco.sh` come here. Scale `paper` is the published run (GPUs,
LLaVA-1.5-7B, the real data sets); scale `tiny` is the same code on the embedded model and world, on a laptop's CPU.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.artifacts.model_card import upload_results, write_model_card
from llava_sculpt.artifacts.open import open_checkpoint
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.compare import compare
from llava_sculpt.evaluation.compare_page import write_page
from llava_sculpt.evaluation.figure import plot_source_target
from llava_sculpt.evaluation.run import evaluate, load_tasks
from llava_sculpt.evaluation.table import format_details, format_table
from llava_sculpt.experiments.tiny_data import prepare_tiny_world
from llava_sculpt.model.adapter import read_run
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.names import METHODS, SOURCES, config_file
from llava_sculpt.train.train import main as train_main

PAPER_MODEL = "llava-hf/llava-1.5-7b-hf"
TINY_MODEL = "data/tiny_llava"
DATA = {"tiny": Path("data/tiny"), "paper": Path("data")}
MODEL = {"tiny": TINY_MODEL, "paper": PAPER_MODEL}
EVAL_BATCH = {"tiny": 100, "paper": 16}
GLOBAL_BATCH = 16
PER_DEVICE_BATCH = 4


def missing_for_paper(task: str) -> list[str]:
    """What this machine lacks for the paper's run, each with how to get it."""
    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU (the paper used 4 x 24 GB)")
    try:
        find_base_checkpoint(PAPER_MODEL)
    except UserError:
        missing.append(f"the base model: hf download {PAPER_MODEL}")
    for name in (task, *SOURCES):
        if not (DATA["paper"] / name / "manifest.json").is_file():
            missing.append(f"data/{name}: llava-sculpt prepare {name} --raw data/raw/{name} --out data/{name}")
    return missing


def finetune(
    task: str, scale: str | None, method: str, rank: int, seed: int, output_dir: str | None, train_flags: list[str]
) -> int:
    """Train, evaluate, and show one run; returns the exit code.

    Args:
        task: iconqa or coco.
        scale: paper, tiny, or None for what this machine can run.
        train_flags: further flags for the training entry point; they win over the configuration file.

    Raises:
        UserError: the scale asked for cannot run here, or any bad input.
    """
    missing = missing_for_paper(task) if scale != "tiny" else []
    if scale == "paper" and missing:
        raise UserError(["--scale paper cannot run here; missing:", *(f"  {item}" for item in missing)])
    chosen = scale or ("tiny" if missing else "paper")
    folder = Path(output_dir or f"runs/{chosen}/{task}/{method}_r{rank}_seed{seed}")
    print(_banner(task, chosen, method, rank, seed, folder, missing))
    if chosen == "tiny":
        prepare_tiny_world(DATA["tiny"])
    load_tasks([task, *SOURCES], DATA[chosen], "test")  # before hours of training, not after
    flags = ["--method", method, "--lora_r", str(rank), "--seed", str(seed), *train_flags]
    code = launch_training(task, chosen, config_file(chosen, task, method), folder, flags)
    if code != 0:
        return code
    zero_shot = _zero_shot(task, chosen)
    results = evaluate_run(folder, task, chosen)
    _show(task, chosen, folder, zero_shot, results)
    return 0


def _banner(task: str, scale: str, method: str, rank: int, seed: int, folder: Path, missing: list[str]) -> str:
    title = f"{METHODS[method].label} on {task}, rank {rank}, seed {seed}, scale {scale} -> {folder}"
    lines = ["=" * 100, title]
    if scale == "tiny":
        lines.append("The embedded tiny LLaVA on generated images: a few minutes on two CPU cores.")
    if missing:
        lines += ["For the paper's own run this machine lacks:", *(f"  - {item}" for item in missing)]
    return "\n".join([*lines, "=" * 100])


def launch_training(task: str, scale: str, config: Path, folder: Path, flags: list[str]) -> int:
    """Train in `folder`: in this process at scale tiny, by `deepspeed` over all visible GPUs at scale paper.

    Args:
        flags: further flags of training; they win over the YAML, the data and the folder.

    Returns:
        The exit code of training.

    Raises:
        UserError: a number of GPUs that the global batch cannot be split over.
    """
    data_path, image_folder = training_data(task, scale)
    ours = ["--config", str(config), "--output_dir", str(folder)]
    ours += ["--data_path", str(data_path), "--image_folder", str(image_folder)]
    if scale == "tiny":
        return train_main([*ours, *flags])
    gpus = torch.cuda.device_count()
    # Global batch 16 on any number of GPUs: 4 x 4 x 1, 2 x 4 x 2, 1 x 4 x 4; with more than 4 fewer per GPU.
    per_device = min(PER_DEVICE_BATCH, GLOBAL_BATCH // gpus) if GLOBAL_BATCH % gpus == 0 else 0
    if per_device == 0:
        raise UserError(
            f"{gpus} GPUs do not divide the global batch of {GLOBAL_BATCH}: "
            "let CUDA_VISIBLE_DEVICES name 1, 2, 4, 8 or 16"
        )
    ours += ["--per_device_train_batch_size", str(per_device)]
    ours += ["--gradient_accumulation_steps", str(GLOBAL_BATCH // (gpus * per_device))]
    entry = Path(__file__).parents[1] / "train" / "train.py"
    command = ["deepspeed", "--num_gpus", str(gpus), str(entry), *ours, *flags]
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode


def training_data(task: str, scale: str) -> tuple[Path, Path]:
    """The training JSON of a Target task, and the folder its images are in."""
    prepared = DATA[scale] / task
    images = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))["image_folder"]
    return prepared / "train.json", (prepared / images).resolve()


def _zero_shot(task: str, scale: str) -> dict[str, Any]:
    """The untouched base model's results, evaluated once and kept while base and data stay the same."""
    file = Path(f"runs/{scale}/{task}/zero_shot/results.json")
    checkpoint = open_checkpoint(MODEL[scale])
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        data = {t.name: t.fingerprint for t in load_tasks([task, *SOURCES], DATA[scale], "test")}
        if known["settings"]["data"] == data and known["base"] == checkpoint.fingerprint():
            return known
    return evaluate_model(MODEL[scale], file.parent, [task, *SOURCES], scale, "Zero-shot")


def evaluate_run(folder: Path, task: str, scale: str) -> dict[str, Any]:
    """Evaluate a finished run on its Target and the four Source tasks; writes its results.json."""
    run = read_run(folder)["config"]
    label = f"{METHODS[run['method']].label} r={run['lora_r']} seed {run['seed']}"
    return evaluate_model(str(folder), folder, [task, *SOURCES], scale, label)


def evaluate_model(
    model: str, folder: Path, tasks: list[str], scale: str, label: str, split: str = "test"
) -> dict[str, Any]:
    """Evaluate a base model or an adapter with the scale's data and batch; writes results.json into `folder`."""
    print(f"evaluating {label} ({model}) on {split}", flush=True)
    prepared = load_tasks(tasks, DATA[scale], split)
    return evaluate(load_for_inference(model), prepared, folder, label=label, batch_size=EVAL_BATCH[scale])


def _show(task: str, scale: str, folder: Path, zero_shot: dict[str, Any], results: dict[str, Any]) -> None:
    rows = [("Zero-shot", zero_shot)]
    for file in sorted(Path(f"runs/{scale}/{task}").glob("*/results.json")):
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if file.parent.resolve() in (folder.resolve(), Path(f"runs/{scale}/{task}/zero_shot").resolve()):
            continue
        # Only what was scored on the same questions, in the same way, may stand in one table.
        if earlier["config_hash"] == results["config_hash"] and earlier["base"] == results["base"]:
            rows.append((earlier["model_id"], earlier))
    rows.append((f"{results['model_id']} (this run)", results))
    write_model_card(folder, results, f"{format_table([rows[0], rows[-1]])}\n\n{format_details(results)}")
    figure = folder / "source_target.png"
    plot_source_target(
        [(label, row["source"], row["target"]) for label, row in rows],
        figure,
        target_name=task,
        title=f"{task}, {scale} scale",
    )
    print(f"\n{format_table(rows)}\n\nfigure: {figure}")
    page = folder / "forgetting.html"
    try:
        write_page(compare([Path(f"runs/{scale}/{task}/zero_shot"), folder], [DATA[scale]]), page)
        print(f"page: {page} (pictures, questions and answers: what was forgotten and learned)")
    except UserError as error:  # the run is there all the same
        print(f"no page of answers: {error}")
    print(f"results: {folder / 'results.json'}")
    upload_results(folder)
