"""What happens in the process of one job: make the adapter, score it, write the result.

The runner starts a fresh process for every job, forked from a server that has imported PyTorch and transformers once,
so a job neither waits for the imports nor sees what another left behind (with a GPU each imports for itself, see the
runner). Heavy imports stay inside the functions, so that the runner can name them without any.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from llava_sculpt.errors import UserError
from llava_sculpt.experiments.grid import Run
from llava_sculpt.experiments.jobs import Job, adapter_folder, adapter_root, is_made
from llava_sculpt.experiments.results import RECORD, result_file, write_result
from llava_sculpt.locks import output_lock
from llava_sculpt.names import DATA, EDITS, METHODS, PENALTIES, ZERO_SHOT
from llava_sculpt.records import read_checked

PRELOAD = [
    "llava_sculpt.experiments.finetune",
    "llava_sculpt.train.train",
    *(f"llava_sculpt.artifacts.{name}" for name in EDITS),
]
_CURVES = ("step", "loss", "task_loss", "cmr_llm", "cmr_connector", *(f"{name}_penalty" for name in PENALTIES))
_CURVE_POINTS = 40


class _TrainerState(TypedDict):
    log_history: list[dict[str, float]]


def check_inputs(runs: list[Run]) -> dict[str, Any]:
    """Check configurations, data and base model of all runs; the hashes of what they start from.

    Returns:
        `base`; `train`, by Target; `data`, by split and task.

    Raises:
        UserError: everything that is wrong.
    """
    from llava_sculpt.artifacts.open import open_checkpoint
    from llava_sculpt.config_reader import parse_config
    from llava_sculpt.evaluation.prepared import load_tasks
    from llava_sculpt.experiments.finetune import MODEL, missing_for_paper, training_data
    from llava_sculpt.experiments.tiny_data import prepare_tiny_world
    from llava_sculpt.records import file_sha256

    scale = runs[0].scale
    targets = sorted({target for run in runs for target in run.targets})
    problems: list[str] = []
    trainings = {json.dumps(run.trained_identity): run for run in runs if run.method != ZERO_SHOT}
    for run in trainings.values():
        try:
            parse_config(["--config", str(run.config_file), *run.train_flags()], elsewhere=True)
        except UserError as error:
            problems += [f"{run.name}: {problem}" for problem in error.problems]
    if scale == "paper":
        missing = dict.fromkeys(item for target in targets for item in missing_for_paper(target))
        problems += [f"--scale paper needs {item}" for item in missing]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    if scale == "tiny":
        prepare_tiny_world(DATA[scale])
    evaluated = sorted({(task, run.split) for run in runs for task in run.tasks})
    data = {
        split: {
            task.name: task.fingerprint
            for task in load_tasks([t for t, s in evaluated if s == split], DATA[scale], split)
        }
        for split in {split for _, split in evaluated}
    }
    return {
        "base": open_checkpoint(MODEL[scale]).fingerprint(),
        "train": {target: file_sha256(training_data(target, scale)[0]) for target in targets},
        "data": data,
    }


def log_file(job: Job) -> Path:
    """Where everything that the job prints goes."""
    return adapter_root(job.run.scale) / "logs" / f"{job.run.adapter_name}.log"


def scores_folder(run: Run) -> Path:
    """Where the predictions of a run go."""
    return adapter_root(run.scale) / "scores" / run.name


def do_job(job: Job) -> None:
    """Run one job to its end, as the main function of its process; the process exits with the job's code."""
    _detach(log_file(job))
    try:
        code = _do(job)
    except UserError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        code = 2
    sys.exit(code)


def _detach(log: Path) -> None:
    """Own process group, output to the log, one thread, and an end as soon as the runner has ended."""
    os.setsid()  # ctrl-C in the terminal reaches the runner alone, which ends its jobs
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    threading.Thread(target=_end_with_runner, daemon=True).start()
    import torch

    torch.set_num_threads(1)  # the same sums in the same order however many jobs run side by side


def _end_with_runner() -> None:
    runner = multiprocessing.parent_process()
    assert runner is not None
    multiprocessing.connection.wait([runner.sentinel])
    os.killpg(0, signal.SIGKILL)  # DeepSpeed's processes too


def _do(job: Job) -> int:
    # Another runner that does this job, or a job of a killed one that is about to end, is waited for.
    with output_lock(log_file(job), wait=True):
        seconds: dict[str, float] = {}
        if job.run.method != ZERO_SHOT and not is_made(job.run):
            print(f"\n===== {job.label}: {adapter_folder(job.run)}", flush=True)
            code = _make_adapter(job.run, seconds)
            if code != 0:
                return code
        for run in job.scores:
            if not result_file(run.scale, run.name).is_file():
                write_result(result_file(run.scale, run.name), _score(run, seconds))
        if job.run.parent is not None:  # nothing builds on it, and it may be as large as the base model
            shutil.rmtree(adapter_folder(job.run))
    return 0


def _make_adapter(run: Run, seconds: dict[str, float]) -> int:
    from llava_sculpt.experiments.finetune import launch_training

    folder, parent = adapter_folder(run), run.parent
    if parent is not None:
        started = time.monotonic()
        _edit(run, adapter_folder(parent), folder)
        seconds["edit"] = time.monotonic() - started
        return 0
    return launch_training(run.task, run.scale, run.config_file, folder, run.train_flags())


def _edit(run: Run, adapter: Path, folder: Path) -> None:
    """Edit beside the folder and rename, so that a kill leaves it whole or not there."""
    from llava_sculpt.artifacts.edit import find_edit, settings_of
    from llava_sculpt.experiments.finetune import training_data

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    data_path, image_folder = training_data(run.task, run.scale)
    given = {"seed": run.seed, "data_path": str(data_path), "image_folder": str(image_folder)}
    settings = {field: run.setting(field) for field in METHODS[run.method].fields}
    find_edit(run.method)(adapter, partial, **settings, **settings_of(run.method, given))
    os.replace(partial, folder)


def _score(run: Run, seconds: dict[str, float]) -> dict[str, Any]:
    from llava_sculpt.evaluation.results_file import RESULTS_FILE
    from llava_sculpt.evaluation.run import summarise
    from llava_sculpt.experiments.finetune import MODEL, evaluate_model
    from llava_sculpt.model.whole import read_run
    from llava_sculpt.train.forgetting import forgetting_curve

    folder, made = adapter_folder(run), run.method != ZERO_SHOT
    (scores_folder(run) / RESULTS_FILE).unlink(missing_ok=True)  # perhaps of an adapter that was made anew since
    started = time.monotonic()
    results = evaluate_model(
        str(folder) if made else MODEL[run.scale], scores_folder(run), run.tasks, run.scale, run.name, run.split
    )
    seconds["evaluate"] = time.monotonic() - started
    trained = read_run(adapter_folder(run.parent or run)) if made else {}
    if run.parent is None and "train_seconds" in trained:
        seconds["train"] = trained["train_seconds"]
    scores = {name: entry["score"] for name, entry in results["tasks"].items()}
    summaries = {target: summarise(scores, target) for target in run.targets}  # all parts were evaluated
    content: dict[str, Any] = {
        "run": {**run.identity, "parent": run.parent.adapter_name if run.parent else None},
        "scores": {
            target: {key: round(summary[key] or 0.0, 4) for key in ("source", "target", "avg")}
            for target, summary in summaries.items()
        },
        "tasks": {
            name: {**{key: entry[key] for key in ("n", "metric", "variant")}, "score": round(entry["score"], 4)}
            for name, entry in results["tasks"].items()
        },
        "evaluation": {key: value for key, value in results["settings"].items() if key != "data"},
        # A merged model is its own base: the one it was trained on counts.
        "base": trained["base"]["fingerprint"] if made else results["base"],
        "data": {**results["settings"]["data"], **({"train": trained["data"]["sha256"]} if trained else {})},
        RECORD: {
            "seconds": {part: round(value, 1) for part, value in seconds.items()},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": results["versions"],
            "precision": results.get("precision"),
            "peak_memory_bytes": trained.get("peak_memory_bytes"),
            "engine": trained.get("engine"),
        },
    }
    if trained:
        content["config"] = {key: value for key, value in trained["identity"].items() if value is not None}
    if made and run.parent is None:
        content["curve"] = _curve(folder)
        if probed := forgetting_curve(folder):
            content["forgetting"] = {key: _rounded(values) for key, values in probed.items()}
    if run.method in ("sculpt", "post_prune"):
        content["densities"] = _densities(folder)
    return content


def _curve(folder: Path) -> dict[str, list[float]]:
    """What training logged, thinned: quantity -> its values, `step` among them."""
    history = read_checked(folder / "trainer_state.json", _TrainerState)["log_history"]
    logs = [entry for entry in history if "loss" in entry]
    logs = logs[:: -(-len(logs) // _CURVE_POINTS) or 1]
    keys = [key for key in _CURVES if key in (logs or [{}])[0]]
    return {key: _rounded(entry[key] for entry in logs) for key in keys}


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _densities(folder: Path) -> dict[str, Any]:
    """Densities of A, B, BA and Theorem 3.1's, over all modules and for each."""
    from llava_sculpt.artifacts.inspect import inspect_adapter

    found = inspect_adapter(folder)
    parts = ("density_A", "density_B", "density_BA", "expected_BA")
    return {
        "parts": parts,
        "total": [round(found["total"][part], 6) for part in parts],
        "modules": {module["name"]: [round(module[part], 6) for part in parts] for module in found["modules"]},
        "shapes": {module["name"]: module["shape"] for module in found["modules"]},
    }
