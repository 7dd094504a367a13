"""One evaluation: prepared tasks -> answers -> scores, Source, Target and Avg, with all that qualifies the numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from typing_extensions import TypedDict

import llava_sculpt
from llava_sculpt.artifacts.inference import Inference
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.processing import processing_fingerprint
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.decode import image_token_count
from llava_sculpt.evaluation.generate import generate_answers
from llava_sculpt.evaluation.journal import Journal
from llava_sculpt.evaluation.prepared import Task
from llava_sculpt.evaluation.processes import from_first, rank, share_out, world_size
from llava_sculpt.evaluation.results_file import (
    RESULTS_FILE,
    Inputs,
    Precision,
    Results,
    Settings,
    TaskResult,
    read_results_file,
)
from llava_sculpt.locks import folder_lock, remove_leftovers
from llava_sculpt.names import SOURCES, is_target
from llava_sculpt.progress import ProgressBar
from llava_sculpt.records import versions, write_atomically, write_json
from llava_sculpt.tasks.common import json_lines


def evaluate(
    loaded: Inference,
    tasks: Sequence[Task],
    out_dir: Path,
    *,
    label: str,
    batch_size: int | None = None,
    max_new_tokens: int = 128,
    exact: bool = False,
    okvqa_variant: str = "authors",
    target: str | None = None,
) -> Results:
    """Answer and score `tasks`, of one split; write `predictions/<task>.jsonl` and `results.json` into `out_dir`.

    Processes of a process group share the questions out; all return the results, the first one writes. Answers
    are kept as they come (`evaluation/journal.py`): after a kill the same call, with any number of processes and any
    batch size, answers only what is left. One evaluation at a time works in `out_dir`.

    Args:
        label: name of the model in the results.
        batch_size: questions at a time (default: see `generate_answers`).
        exact: in 16 bits too no answer depends on batch size, processes or interruptions, as in float32. Otherwise
            near-ties may, and a continued evaluation may answer a few questions otherwise than one in a single piece.
        target: the task that counts as Target, see `choose_target`.

    Returns:
        The content of results.json: "model_id", "base" (the base checkpoint's fingerprint), "tasks" {name: score, n,
        split, metric, variant, prompt_style, decoding, and a benchmark's further numbers}, "source" (mean of the four
        Source tasks), "target", "target_task", "avg" (Eq. 42), each None if a part is missing, "settings" with
        "config_hash", "inputs" (fingerprints of model, tokenizer with preprocessor, and images), "precision" (dtype,
        exact, whether an adapter is merged), "versions". All scores are on the paper's scale. The hash covers data,
        prompts, decoding and scorers, not model, precision or batch size: equal hashes mean comparable scores.

    Raises:
        UserError: a batch size or number of tokens below 1, a wrong target, images that cannot be used, a folder that
            cannot be written, holds results of another model, or is in use.
    """
    if (batch_size is not None and batch_size < 1) or max_new_tokens < 1:
        raise UserError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    target = choose_target([task.name for task in tasks], target)
    inputs = from_first(lambda: _inputs(loaded, tasks))
    with folder_lock(out_dir) if rank() == 0 else nullcontext():
        from_first(lambda: _check_model(out_dir, inputs, loaded, label))
        return _evaluate(
            loaded, tasks, out_dir, inputs, label, batch_size, max_new_tokens, exact, okvqa_variant, target
        )


def _evaluate(
    loaded: Inference,
    tasks: Sequence[Task],
    out_dir: Path,
    inputs: Inputs,
    label: str,
    batch_size: int | None,
    max_new_tokens: int,
    exact: bool,
    okvqa_variant: str,
    target: str | None,
) -> Results:
    split = tasks[0].split
    decoding = f"greedy, at most {max_new_tokens} new tokens"
    folder = out_dir / "predictions"
    precision = precision_of(loaded, exact)
    if rank() == 0:
        remove_leftovers(folder)
        print(_how(loaded, precision), flush=True)
    journals = {task.name: Journal(folder, task.name, _key(inputs, task, max_new_tokens, precision)) for task in tasks}
    known = from_first(lambda: {name: journal.read() for name, journal in journals.items()})

    def answer_rest(task: Task) -> None:
        rest = [question for question in task.questions if question["question_id"] not in known[task.name]]
        shares = share_out(
            [len(encode_prompt(q["text"], loaded.tokenizer, False, q.get("rounds", ()))) for q in rest],
            [q.get("image") for q in rest],
            image_token_count(loaded.model.config),
            world_size(),
        )
        mine = [rest[place] for place in shares[rank()]]
        journal = journals[task.name]
        try:
            parts = loaded.model, loaded.tokenizer, loaded.preprocessor
            for answers in generate_answers(*parts, mine, task.image_folder, batch_size, max_new_tokens, exact):
                journal.append({mine[place]["question_id"]: text for place, text in answers.items()}, rank())
                if bar.shown:
                    bar.to(sum(part.count() for part in journals.values()))
        finally:
            journal.close()

    def write_and_score() -> dict[str, TaskResult]:
        scored = {}
        (out_dir / RESULTS_FILE).unlink(missing_ok=True)  # of earlier predictions
        for task in tasks:
            answers = journals[task.name].read()
            lost = sum(question["question_id"] not in answers for question in task.questions)
            if lost:
                raise UserError(f"{folder}: {lost} answers to {task.name} are gone: run the same command again")
            pairs = [(question["question_id"], answers[question["question_id"]]) for question in task.questions]
            metadata = {"split": split, "prompt_style": task.prompt_style, "decoding": decoding}
            _write_predictions(folder / f"{task.name}.jsonl", task, [text for _, text in pairs], label, metadata)
            variant = okvqa_variant if task.name == "okvqa" else "authors"
            score = task.scorer.score(task.gold, pairs, variant, None)
            entry = {key: getattr(score, key) for key in ("score", "n", "metric", "variant")}
            scored[task.name] = cast(TaskResult, {**entry, **metadata, **score.extra})
        return scored

    total, before = sum(len(task.questions) for task in tasks), sum(map(len, known.values()))
    with ProgressBar("answers", total, before) as bar:
        try:
            for task in tasks:
                answer_rest(task)
        except OSError as error:
            raise UserError(f"{folder}: cannot write the predictions: {error}") from error
    from_first(lambda: None)  # the others may still answer
    scored = from_first(write_and_score)
    settings: Settings = {
        "split": split,
        "max_new_tokens": max_new_tokens,
        "data": {task.name: task.fingerprint for task in tasks},
        "prompt_styles": {task.name: task.prompt_style for task in tasks},
        "scorers": {name: f"{entry['metric']}, {entry['variant']}" for name, entry in scored.items()},
    }
    results: Results = {
        "model_id": label,
        "base": loaded.checkpoint.fingerprint(),
        "tasks": scored,
        **summarise({name: entry["score"] for name, entry in scored.items()}, target),
        "settings": settings,
        "config_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "inputs": inputs,
        "precision": precision,
        "versions": versions(),
    }
    if rank() == 0:
        write_json(out_dir / RESULTS_FILE, results)
        for journal in journals.values():
            journal.remove()
    return results


def _inputs(loaded: Inference, tasks: Sequence[Task]) -> Inputs:
    images, problems = {}, []
    for task in tasks:
        try:
            images[task.name] = task.images
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    processing = processing_fingerprint(loaded.checkpoint.path)
    return {"model": loaded.fingerprint(), "processing": processing, "images": images}


def _check_model(out_dir: Path, inputs: Inputs, loaded: Inference, label: str) -> None:
    """Refuse a folder with results of another model, or with a results.json that is not ours."""
    file = out_dir / RESULTS_FILE
    if not file.exists():
        return
    advice = "choose another folder (--output_dir), or delete that file"
    try:
        known = read_results_file(file)
    except UserError as error:
        raise UserError([*error.problems, f"{file}: not the results of an evaluation: {advice}"]) from error
    if "inputs" in known:
        same = known["inputs"]["model"] == inputs["model"]
    else:
        same = (known["model_id"], known["base"]) == (label, loaded.checkpoint.fingerprint())
    if not same:
        raise UserError(
            f"{file}: results of another model ({known['model_id']}), or of this one in another dtype or on another "
            f"device: {advice}"
        )


def precision_of(loaded: Inference, exact: bool) -> Precision:
    """How `evaluate` computes the answers of a model."""
    dtype = loaded.weight.dtype
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "exact": exact or dtype == torch.float32, "merged": loaded.merged}


def _how(loaded: Inference, precision: Precision) -> str:
    """Where and in which precision it is answered, in a line."""
    count, on_gpu = world_size(), loaded.weight.device.type == "cuda"
    where = f"{count} {'GPU' if on_gpu else 'CPU process'}{('s' if on_gpu else 'es') * (count > 1)}"
    ties = "no answer depends on the batch" if precision["exact"] else "near-ties may depend on the batch (not --exact)"
    return f"evaluating on {where}, {precision['dtype']}: {ties}"


def _key(inputs: Inputs, task: Task, max_new_tokens: int, precision: Precision) -> str:
    """What decides the answers to a task: model, processing, questions, images, decoding, and the code that does it."""
    parts = [llava_sculpt.__version__, torch.__version__, inputs["model"], inputs["processing"]]
    parts += [task.fingerprint, inputs["images"][task.name], str(max_new_tokens)]
    if not precision["exact"] or precision["merged"]:
        parts.append(json.dumps(precision, sort_keys=True))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Summary(TypedDict):
    """Source, Target and Avg of Eq. 42, and the name of the Target task."""

    source: float | None
    target: float | None
    target_task: str | None
    avg: float | None


def summarise(scores: Mapping[str, float], target: str | None) -> Summary:
    """Source (mean of the four Source tasks), Target and Avg = (Source + Target) / 2 (Eq. 42); None where unknown."""
    source = sum(scores[name] for name in SOURCES) / len(SOURCES) if all(n in scores for n in SOURCES) else None
    goal = scores.get(target) if target is not None else None
    avg = (source + goal) / 2 if source is not None and goal is not None else None
    return {"source": source, "target": goal, "target_task": target, "avg": avg}


def choose_target(names: Sequence[str], target: str | None) -> str | None:
    """The Target task: `target` if given (UserError unless it is evaluated), else the only one in `names`."""
    present = [name for name in names if is_target(name)]
    if target is None:
        return present[0] if len(present) == 1 else None
    if target not in present:
        raise UserError(f"--target {target}: not among the Target tasks in --tasks ({', '.join(present) or 'none'})")
    return target


def _write_predictions(path: Path, task: Task, texts: Sequence[str], model_id: str, metadata: dict[str, Any]) -> None:
    records = [
        {
            "question_id": question["question_id"],
            "prompt": question["text"],
            "text": text,
            "answer_id": f"{task.name}-{task.split}-{number}",
            "model_id": model_id,
            "metadata": metadata,
        }
        for number, (question, text) in enumerate(zip(task.questions, texts, strict=True))
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_lines(records))
    except OSError as error:
        raise UserError(f"{path}: cannot write the predictions: {error}") from error
