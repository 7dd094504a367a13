"""The main job: fine-tune on IconQA or COCO, evaluate what was learned and what was forgotten, show both.

`bash scripts/finetune_iconqa.sh` and `scripts/finetune_coco.sh` come here. Scale `paper` is the published run (GPUs,
LLaVA-1.5-7B, the real data sets); scale `tiny` is the same code on the embedded model and world, on a laptop's CPU.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.artifacts.model_card import upload_results, write_model_card
from llava_sculpt.artifacts.open import open_checkpoint
from llava_sculpt.config_reader import with_defaults, without_token
from llava_sculpt.data.processing import processing_fingerprint
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.compare import compare
from llava_sculpt.evaluation.compare_page import write_page
from llava_sculpt.evaluation.figure import plot_source_target
from llava_sculpt.evaluation.prepared import load_tasks
from llava_sculpt.evaluation.results_file import RESULTS_FILE, Results, read_results_file
from llava_sculpt.evaluation.run import evaluate
from llava_sculpt.evaluation.table import format_details, format_table
from llava_sculpt.experiments.tiny_data import prepare_tiny_world
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.whole import read_run
from llava_sculpt.names import METHODS, SOURCES, config_file
from llava_sculpt.tasks.common import read_manifest
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
    flags = with_defaults(train_flags, {"method": method, "lora_r": rank, "seed": seed})
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
    ours: dict[str, object] = {"data_path": data_path, "image_folder": image_folder}
    ours |= {"config": config, "output_dir": folder}
    if scale == "tiny":
        return train_main(with_defaults(flags, ours))
    gpus = torch.cuda.device_count()
    # Global batch 16 on any number of GPUs: 4 x 4 x 1, 2 x 4 x 2, 1 x 4 x 4; with more than 4 fewer per GPU.
    per_device = min(PER_DEVICE_BATCH, GLOBAL_BATCH // gpus) if GLOBAL_BATCH % gpus == 0 else 0
    if per_device == 0:
        raise UserError(
            f"{gpus} GPUs do not divide the global batch of {GLOBAL_BATCH}: "
            "let CUDA_VISIBLE_DEVICES name 1, 2, 4, 8 or 16"
        )
    ours["per_device_train_batch_size"] = per_device
    ours["gradient_accumulation_steps"] = GLOBAL_BATCH // (gpus * per_device)
    entry = Path(__file__).parents[1] / "train" / "train.py"
    # The launcher prints its command line, and everybody can list it: the token goes another way.
    flags, token = without_token(flags)
    command = ["deepspeed", "--num_gpus", str(gpus), str(entry), *with_defaults(flags, ours)]
    print("+", shlex.join(command), flush=True)
    environment = {**os.environ, **({"HF_TOKEN": token} if token else {})}
    return subprocess.run(command, check=False, env=environment).returncode


def training_data(task: str, scale: str) -> tuple[Path, Path]:
    """The training JSON of a Target task, and the folder its images are in."""
    prepared = DATA[scale] / task
    return prepared / "train.json", (prepared / read_manifest(prepared, task)["image_folder"]).resolve()


def _zero_shot(task: str, scale: str) -> Results:
    """The untouched base model's results, evaluated once and kept while base, processing, data and images are."""
    file = Path(f"runs/{scale}/{task}/zero_shot") / RESULTS_FILE
    checkpoint = open_checkpoint(MODEL[scale])
    known = _read_or_skip(file) if file.is_file() else None
    if known is not None and "inputs" in known and known["base"] == checkpoint.fingerprint():
        tasks = load_tasks([task, *SOURCES], DATA[scale], "test")
        if (
            known["settings"]["data"] == {t.name: t.fingerprint for t in tasks}
            and known["inputs"]["images"] == {t.name: t.images for t in tasks}
            and known["inputs"]["processing"] == processing_fingerprint(checkpoint.path)
        ):
            return known
    if file.is_file():
        file.unlink()
    return evaluate_model(MODEL[scale], file.parent, [task, *SOURCES], scale, "Zero-shot")


def evaluate_run(folder: Path, task: str, scale: str) -> Results:
    """Evaluate a finished run on its Target and the four Source tasks; writes its results.json."""
    run = read_run(folder)["config"]
    label = f"{METHODS[run['method']].label} r={run['lora_r']} seed {run['seed']}"
    return evaluate_model(str(folder), folder, [task, *SOURCES], scale, label)


def evaluate_model(model: str, folder: Path, tasks: list[str], scale: str, label: str, split: str = "test") -> Results:
    """Evaluate a base model or an adapter with the scale's data and batch; writes results.json into `folder`."""
    print(f"evaluating {label} ({model}) on {split}", flush=True)
    prepared = load_tasks(tasks, DATA[scale], split)
    return evaluate(load_for_inference(model), prepared, folder, label=label, batch_size=EVAL_BATCH[scale])


def _read_or_skip(file: Path) -> Results | None:
    """The results in a file; None for a damaged one, said in a line."""
    try:
        return read_results_file(file)
    except UserError as error:
        print(f"not used: {error.problems[0]}", file=sys.stderr)
        return None


def _comparable(earlier: Results, results: Results) -> bool:
    same = [earlier[key] == results[key] for key in ("config_hash", "base", "target_task")]
    if "inputs" in earlier:
        same += [earlier["inputs"][key] == results["inputs"][key] for key in ("processing", "images")]
    return all(same) and None not in (earlier["source"], earlier["target"])


def _show(task: str, scale: str, folder: Path, zero_shot: Results, results: Results) -> None:
    rows = [("Zero-shot", zero_shot)]
    for file in sorted(Path(f"runs/{scale}/{task}").glob(f"*/{RESULTS_FILE}")):
        if file.parent.resolve() in (folder.resolve(), Path(f"runs/{scale}/{task}/zero_shot").resolve()):
            continue
        earlier = _read_or_skip(file)
        # Only what was scored on the same questions, in the same way, may stand in one table.
        if earlier is not None and _comparable(earlier, results):
            rows.append((earlier["model_id"], earlier))
    rows.append((f"{results['model_id']} (this run)", results))
    write_model_card(folder, results, f"{format_table([rows[0], rows[-1]])}\n\n{format_details(results)}")
    figure = folder / "source_target.png"
    plot_source_target(
        [(label, row["source"] or 0.0, row["target"] or 0.0) for label, row in rows],  # all were evaluated
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
    print(f"results: {folder / RESULTS_FILE}")
    upload_results(folder)
