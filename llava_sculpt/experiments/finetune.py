"""The main job: fine-tune on IconQA, COCO or one's own task, evaluate what was learned and forgotten, show both.

`bash scripts/finetune_iconqa.sh`, `finetune_coco.sh` and `finetune_task.sh` come here. Scale `paper` is the published
run (GPUs, LLaVA-1.5-7B, the real data sets); scale `tiny` is the same code on the embedded model and world, on a
laptop's CPU.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from llava_sculpt.artifacts.inference import inference_dtype, load_for_inference
from llava_sculpt.artifacts.model_card import upload_results, write_model_card
from llava_sculpt.artifacts.open import open_checkpoint
from llava_sculpt.config_reader import flag_value, with_defaults, without_token
from llava_sculpt.data.dataset import read_training_file
from llava_sculpt.data.processing import processing_fingerprint
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.compare import compare
from llava_sculpt.evaluation.compare_page import write_page
from llava_sculpt.evaluation.figure import plot_forgetting, plot_source_target
from llava_sculpt.evaluation.own import prepare_own
from llava_sculpt.evaluation.prepared import Task, load_tasks, own_tasks
from llava_sculpt.evaluation.processes import gpu_count, launch, process_group
from llava_sculpt.evaluation.results_file import RESULTS_FILE, Results, read_results_file
from llava_sculpt.evaluation.run import evaluate
from llava_sculpt.evaluation.table import format_details, format_table, table_cells
from llava_sculpt.experiments.tiny_data import prepare_tiny_world
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.whole import read_run
from llava_sculpt.names import DATA, METHODS, SOURCES, TARGETS, TASKS, config_file, task_label
from llava_sculpt.progress import on_terminal, panel, print_table
from llava_sculpt.tasks.common import MANIFEST, describe, read_manifest
from llava_sculpt.train.forgetting import forgetting_curve
from llava_sculpt.train.train import main as train_main

PAPER_MODEL = "llava-hf/llava-1.5-7b-hf"
TINY_MODEL = "data/tiny_llava"
MODEL = {"tiny": TINY_MODEL, "paper": PAPER_MODEL}
EVAL_BATCH = {"tiny": 100, "paper": None}  # None: what a GPU's free memory allows
GLOBAL_BATCH = 16
PER_DEVICE_BATCH = 4
PROBE = 32  # pictures of one's own task


def missing_for_paper(task: str, model: str = PAPER_MODEL) -> list[str]:
    """What this machine lacks for the paper's run, or one's own at that scale, each with how to get it."""
    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU (the paper used 4 x 24 GB)")
    try:
        find_base_checkpoint(model)
    except UserError:
        missing.append(f"the base model: hf download {model}")
    for name in (task, *SOURCES) if task in TASKS else ():
        if not (DATA["paper"] / name / MANIFEST).is_file():
            missing.append(f"data/{name}: llava-sculpt prepare {name} --raw data/raw/{name} --out data/{name}")
    return missing


def finetune(
    task: str,
    scale: str | None,
    method: str,
    rank: int,
    seed: int,
    output_dir: str | None,
    train_flags: list[str],
    data: Path | None = None,
    **own: Any,
) -> int:
    """Train, evaluate, and show one run; returns the exit code.

    Args:
        task: iconqa, coco, or the name of one's own task.
        scale: paper, tiny, or None for what this machine can run.
        train_flags: further flags for the training entry point; they win over the configuration file.
        data: training JSON of one's own task, prepared here with `own`, the options of `prepare_own`; None if that
            was done before.

    Raises:
        UserError: the scale asked for cannot run here, or any bad input.
    """
    _check_flags(task, train_flags)
    base = flag_value(train_flags, "model_name_or_path")
    missing = missing_for_paper(task, base or PAPER_MODEL) if scale != "tiny" else []
    if scale == "paper" and missing:
        raise UserError(["--scale paper cannot run here; missing:", *(f"  {item}" for item in missing)])
    chosen = scale or ("tiny" if missing else "paper")
    model = base or MODEL[chosen]
    folder = Path(output_dir or f"runs/{chosen}/{task}/{method}_r{rank}_seed{seed}")
    if data is not None:
        print(describe(DATA[chosen] / task, prepare_own(DATA[chosen] / task, data, **own)))
    if task not in TARGETS:
        _check_own(task, chosen)
    print(_banner(task, chosen, method, rank, seed, folder, missing))
    if chosen == "tiny":
        prepare_tiny_world(DATA["tiny"])
    tasks = [task, *SOURCES]
    if task not in TARGETS:
        tasks = [task, *(name for name in SOURCES if (DATA[chosen] / name / MANIFEST).is_file())]
    _say_tasks(load_tasks(tasks, DATA[chosen], "test"))  # before hours of training, not after
    flags = with_defaults(train_flags, {"method": method, "lora_r": rank, "seed": seed})
    if task not in TARGETS and any("image" in record for record in read_training_file(training_data(task, chosen)[0])):
        # Whoever has none of the benchmarks sees on general questions about the own pictures what is forgotten.
        flags = with_defaults(flags, {"forgetting_probe": PROBE})
    code = launch_training(task, chosen, config_file(chosen, task, method), folder, flags)
    if code != 0:
        return code
    zero_shot = _zero_shot(model, tasks, chosen)
    run = read_run(folder)["config"]
    label = f"{METHODS[run['method']].label} r={run['lora_r']} seed {run['seed']}"
    results = evaluate_model(str(folder), folder, tasks, chosen, label)
    with panel(f"{label} on {task}, scale {chosen}"):
        _show(task, chosen, folder, zero_shot, results)
        if on_terminal():
            print(f'next: llava-sculpt ask {shlex.quote(str(folder))} --image PICTURE "What is this?"')
    return 0


def _check_flags(task: str, flags: list[str]) -> None:
    """Refuse flags of training that say otherwise than the command itself what is trained on, and then scored."""
    problems = [
        f"--{key}: finetune trains on {task} and scores it; your own data: --data FILE --images DIR --name NAME"
        for key in ("data_path", "image_folder")
        if flag_value(flags, key) is not None
    ]
    if problems:
        raise UserError(problems)


def _check_own(task: str, scale: str) -> None:
    """Refuse what is no task of one's own that is prepared, or has no training data."""
    own = own_tasks(DATA[scale])
    if task not in own:
        known = ", ".join([*TARGETS, *own])
        raise UserError(f"{task}: no task to train on; in {DATA[scale]}: {known}; your own: --data FILE --images DIR")
    training_data(task, scale)


def _say_tasks(tasks: Sequence[Task]) -> None:
    asked = ", ".join(f"{task.name} {len(task.questions):,}" for task in tasks)
    print(f"test questions: {asked}")
    if lacking := [name for name in SOURCES if name not in {task.name for task in tasks}]:
        print(f"not prepared, so what is forgotten of them is not measured: {', '.join(lacking)} (data/README.md)")


def _banner(task: str, scale: str, method: str, rank: int, seed: int, folder: Path, missing: list[str]) -> str:
    title = f"{METHODS[method].label} on {task}, rank {rank}, seed {seed}, scale {scale} -> {folder}"
    rule = "=" * (min(100, shutil.get_terminal_size().columns) if on_terminal() else 100)
    lines = [rule, title]
    if scale == "tiny":
        lines.append("The embedded tiny LLaVA on generated images: a few minutes on two CPU cores.")
    if missing:
        lines += ["For the paper's own run this machine lacks:", *(f"  - {item}" for item in missing)]
    return "\n".join([*lines, rule])


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
    """The training JSON of a Target task, and the folder its images are in.

    Raises:
        UserError: a task that is not prepared, or only to be scored.
    """
    prepared = DATA[scale] / task
    images = (prepared / read_manifest(prepared, task)["image_folder"]).resolve()
    if not (prepared / "train.json").is_file():
        raise UserError(f"{prepared}: holds no train.json: prepared to be scored only; give training data with --data")
    return prepared / "train.json", images


def _zero_shot(model: str, names: list[str], scale: str) -> Results:
    """The untouched base model's results, evaluated once and kept while base, processing, data, images, dtype are."""
    file = Path(f"runs/{scale}/{names[0]}/zero_shot") / RESULTS_FILE
    checkpoint = open_checkpoint(model)
    known = _read_or_skip(file) if file.is_file() else None
    if known is not None and "inputs" in known and known["base"] == checkpoint.fingerprint():
        tasks = load_tasks(names, DATA[scale], "test")
        if (
            known["settings"]["data"] == {t.name: t.fingerprint for t in tasks}
            and known["inputs"]["images"] == {t.name: t.images for t in tasks}
            and known["inputs"]["processing"] == processing_fingerprint(checkpoint.path)
            and ("precision" not in known or f"torch.{known['precision']['dtype']}" == str(inference_dtype(checkpoint)))
        ):
            return known
    if file.is_file():
        file.unlink()
    return evaluate_model(model, file.parent, names, scale, "Zero-shot")


def evaluate_model(model: str, folder: Path, tasks: list[str], scale: str, label: str, split: str = "test") -> Results:
    """Evaluate a base model or an adapter with the scale's data and batch; writes results.json into `folder`.

    At scale paper on all visible GPUs, a process each.

    Raises:
        UserError: data, model or folder cannot be used.
    """
    print(f"evaluating {label} ({model}) on {split}", flush=True)
    prepared = load_tasks(tasks, DATA[scale], split)
    processes = gpu_count() if scale == "paper" else 1
    if processes == 1:
        return evaluate(
            load_for_inference(model, merge=True), prepared, folder, label=label, batch_size=EVAL_BATCH[scale]
        )
    code = launch(processes, _evaluate_share, [model, str(folder), ",".join(tasks), scale, label, split])
    if code != 0:
        raise UserError(f"{folder}: not evaluated: one of {processes} processes ended with exit code {code}, see above")
    return read_results_file(folder / RESULTS_FILE)


def _evaluate_share(arguments: list[str]) -> int:
    """One of the processes of `evaluate_model`; returns its exit code."""
    model, folder, tasks, scale, label, split = arguments
    try:
        with process_group():
            prepared = load_tasks(tasks.split(","), DATA[scale], split)
            loaded = load_for_inference(model, merge=True)
            evaluate(loaded, prepared, Path(folder), label=label, batch_size=EVAL_BATCH[scale])
    except UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 2
    return 0


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
    return all(same) and earlier["target"] is not None


def _show(task: str, scale: str, folder: Path, zero_shot: Results, results: Results) -> None:
    rows = [("Zero-shot", zero_shot)]
    for file in sorted(Path(f"runs/{scale}/{task}").glob(f"*/{RESULTS_FILE}")):
        if file.parent.resolve() in (folder.resolve(), Path(f"runs/{scale}/{task}/zero_shot").resolve()):
            continue
        earlier = _read_or_skip(file)
        # Only what was scored on the same questions, in the same way, may stand in one table.
        if earlier is not None and _comparable(earlier, results):
            same = earlier["model_id"] == results["model_id"]  # with other settings
            rows.append((f"{earlier['model_id']} ({file.parent.name})" if same else earlier["model_id"], earlier))
    rows.append((f"{results['model_id']} (this run)", results))
    write_model_card(folder, results, f"{format_table([rows[0], rows[-1]])}\n\n{format_details(results)}")
    print_table(table_cells(rows), format_table(rows))
    print()
    if kept := [name for name in SOURCES if name in results["tasks"]]:
        figure = folder / "source_target.png"
        points = [
            (label, fmean(row["tasks"][name]["score"] for name in kept), row["target"] or 0.0)  # both were evaluated
            for label, row in rows
        ]
        source = "Source" if results["source"] is not None else f"mean of {', '.join(map(task_label, kept))}"
        title = f"{task}, {scale} scale"
        plot_source_target(points, figure, source_name=source, target_name=task_label(task), title=title)
        print(f"figure: {figure}")
    if curve := forgetting_curve(folder):
        figure = folder / "forgetting.png"
        plot_forgetting(curve, figure, title=f"{folder.name}: general questions about pictures of {task}")
        kl, changed = (curve[key][-1] for key in ("forgetting_kl", "forgetting_changed"))
        told = f"{changed:.0%} of answers changed, KL {kl:.3g} nats a token"
        print(f"figure: {figure} (general questions about training pictures: {told})")
    page = folder / "forgetting.html"
    try:
        write_page(compare([Path(f"runs/{scale}/{task}/zero_shot"), folder], [DATA[scale]]), page)
        print(f"page: {page} (pictures, questions and answers: what was forgotten and learned)")
    except UserError as error:  # the run is there all the same
        print(f"no page of answers: {error}")
    print(f"results: {folder / RESULTS_FILE}")
    upload_results(folder)
