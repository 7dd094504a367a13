"""One evaluation: prepared tasks -> answers -> scores, Source, Target and Avg, with all that qualifies the numbers."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import llava_sculpt
from llava_sculpt.artifacts.inference import Inference
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.decode import image_token_count
from llava_sculpt.evaluation.generate import generate_answers
from llava_sculpt.evaluation.journal import Journal
from llava_sculpt.evaluation.processes import from_first, rank, share_out, world_size
from llava_sculpt.evaluation.score_files import read_gold
from llava_sculpt.evaluation.scorers import scorer_of
from llava_sculpt.names import PAPER_TASKS, SOURCES, TARGETS, TASKS
from llava_sculpt.records import versions, write_atomically, write_json
from llava_sculpt.tasks.common import MANIFEST, json_lines, load_json
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems

Results = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A split of a prepared data set, read and checked."""

    name: str
    split: str
    questions: list[dict[str, Any]]
    gold: dict[Any, Any]
    image_folder: Path
    prompt_style: str
    fingerprint: str


def tasks_of(name: str) -> list[str]:
    """`all` (Targets and Sources), or a comma-separated list of task names, each once.

    Raises:
        UserError: a name that is not a task.
    """
    names = list(PAPER_TASKS) if name == "all" else [part.strip() for part in name.split(",") if part.strip()]
    known = f"known: all, {', '.join(TASKS)}"
    problems = [] if names else [f"--tasks: empty; {known}"]
    for unknown in (part for part in names if part not in TASKS):
        near = get_close_matches(unknown.lower(), TASKS, 1)
        hint = f"did you mean {near[0]}?" if near else known
        if "/" in unknown or Path(unknown).is_dir():
            hint = f"it looks like a model, which --model takes; {known}"
        problems.append(f"--tasks: {unknown} is not a task; {hint}")
    if problems:
        raise UserError(problems)
    return list(dict.fromkeys(names))


def load_tasks(names: Sequence[str], data_root: Path, split: str) -> list[Task]:
    """Read the prepared data of every task in `names` from `data_root/<name>/`.

    Call it before loading a model: one UserError lists every task that is not prepared, lacks the split, has a
    malformed file, or misses images.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    for name in names:
        try:
            tasks.append(_load_task(name, data_root / name, split))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return tasks


def evaluate(
    loaded: Inference,
    tasks: Sequence[Task],
    out_dir: Path,
    *,
    label: str,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    okvqa_variant: str = "authors",
    target: str | None = None,
) -> Results:
    """Answer and score `tasks`, of one split; write `predictions/<task>.jsonl` and `results.json` into `out_dir`.

    Processes of a process group share the questions out; all return the results, the first one writes. Answers
    are kept as they come (`evaluation/journal.py`): after a kill the same call, with any number of processes and any
    batch size, answers only what is left.

    Args:
        label: name of the model in the results.
        batch_size: questions at a time; changes no answer.
        target: the task that counts as Target, see `choose_target`.

    Returns:
        The content of results.json: "model_id", "base" (the base checkpoint's fingerprint), "tasks" {name: score, n,
        split, metric, variant, prompt_style, decoding, and a benchmark's further numbers}, "source" (mean of the four
        Source tasks), "target", "target_task", "avg" (Eq. 42), each None if a part is missing, "settings" with
        "config_hash", "versions". All scores are on the paper's scale. The hash covers data, prompts, decoding and
        scorers, not model or batch size: equal hashes mean comparable scores.

    Raises:
        UserError: a batch size or number of tokens below 1, a wrong target, a folder that cannot be written.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise UserError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    target = choose_target([task.name for task in tasks], target)
    split = tasks[0].split
    decoding = f"greedy, at most {max_new_tokens} new tokens"
    folder = out_dir / "predictions"
    model = loaded.fingerprint()
    journals = {task.name: Journal(folder, task.name, _key(model, task, max_new_tokens)) for task in tasks}
    known = from_first(lambda: {name: journal.read() for name, journal in journals.items()})

    def answer_rest(task: Task) -> None:
        rest = [question for question in task.questions if question["question_id"] not in known[task.name]]
        shares = share_out(
            [len(encode_prompt(q["text"], loaded.tokenizer, has_image=False)) for q in rest],
            [q.get("image") for q in rest],
            image_token_count(loaded.model.config),
            world_size(),
        )
        mine = [rest[place] for place in shares[rank()]]
        journal = journals[task.name]
        try:
            parts = loaded.model, loaded.tokenizer, loaded.preprocessor
            for answers in generate_answers(*parts, mine, task.image_folder, batch_size, max_new_tokens):
                journal.append({mine[place]["question_id"]: text for place, text in answers.items()}, rank())
                if not bar.disable:
                    bar.update(sum(part.count() for part in journals.values()) - bar.n)
        finally:
            journal.close()

    def write_and_score() -> dict[str, dict[str, Any]]:
        scored = {}
        for task in tasks:
            answers = journals[task.name].read()
            pairs = [(question["question_id"], answers[question["question_id"]]) for question in task.questions]
            metadata = {"split": split, "prompt_style": task.prompt_style, "decoding": decoding}
            _write_predictions(folder / f"{task.name}.jsonl", task, [text for _, text in pairs], label, metadata)
            variant = okvqa_variant if task.name == "okvqa" else "authors"
            score = scorer_of(task.name).score(task.gold, pairs, variant, None)
            entry = {key: getattr(score, key) for key in ("score", "n", "metric", "variant")}
            scored[task.name] = {**entry, **metadata, **score.extra}
        for journal in journals.values():
            journal.remove()
        return scored

    total, before = sum(len(task.questions) for task in tasks), sum(map(len, known.values()))
    silent = rank() > 0 or not sys.stderr.isatty()
    # From the answers of an earlier process on: they say nothing about how fast this one is.
    with tqdm(total=total, initial=before, unit="q", desc="answers", disable=silent) as bar:
        try:
            for task in tasks:
                answer_rest(task)
        except OSError as error:
            raise UserError(f"{folder}: cannot write the predictions: {error}") from error
    from_first(lambda: None)  # the others may still answer
    scored = from_first(write_and_score)
    settings = {
        "split": split,
        "max_new_tokens": max_new_tokens,
        "data": {task.name: task.fingerprint for task in tasks},
        "prompt_styles": {task.name: task.prompt_style for task in tasks},
        "scorers": {name: f"{entry['metric']}, {entry['variant']}" for name, entry in scored.items()},
    }
    results = {
        "model_id": label,
        "base": loaded.checkpoint.fingerprint(),
        "tasks": scored,
        **summarise({name: entry["score"] for name, entry in scored.items()}, target),
        "settings": settings,
        "config_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "versions": versions(),
    }
    if rank() == 0:
        write_json(out_dir / "results.json", results)
    return results


def _key(model_fingerprint: str, task: Task, max_new_tokens: int) -> str:
    """What decides the answers to a task: model, questions, decoding, and the code that does it."""
    parts = [llava_sculpt.__version__, torch.__version__, model_fingerprint, task.fingerprint, max_new_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def summarise(scores: Mapping[str, float], target: str | None) -> dict[str, Any]:
    """Source (mean of the four Source tasks), Target and Avg = (Source + Target) / 2 (Eq. 42); None where unknown."""
    source = sum(scores[name] for name in SOURCES) / len(SOURCES) if all(n in scores for n in SOURCES) else None
    goal = scores.get(target) if target is not None else None
    avg = (source + goal) / 2 if source is not None and goal is not None else None
    return {"source": source, "target": goal, "target_task": target, "avg": avg}


def choose_target(names: Sequence[str], target: str | None) -> str | None:
    """The Target task: `target` if given (UserError unless it is evaluated), else the only one in `names`."""
    present = [name for name in TARGETS if name in names]
    if target is None:
        return present[0] if len(present) == 1 else None
    if target not in present:
        raise UserError(f"--target {target}: not among the Target tasks in --tasks ({', '.join(present) or 'none'})")
    return target


def _load_task(name: str, folder: Path, split: str) -> Task:
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: {name} is not prepared; run: llava-sculpt prepare {name} --raw raw/{name} --out {folder} "
            "(data/README.md), or name the folder of the prepared data with --data_root"
        )
    manifest = load_json(folder / MANIFEST, dict)
    file, gold_file = folder / f"{split}.jsonl", folder / f"{split}_annotations.json"
    if not file.is_file() or not gold_file.is_file():
        have = ", ".join(s for s in manifest.get("splits", {}) if s != "train") or "none"
        raise UserError(f"{folder}: no split {split!r} (evaluation splits there: {have})")
    questions = _read_questions(file)
    images = (folder / manifest["image_folder"]).resolve()
    missing = [q["image"] for q in questions if "image" in q and not (images / q["image"]).is_file()]
    if missing:
        raise UserError(f"{file}: {len(missing)} images are not in {images}, the first: {missing[0]}")
    fingerprint = hashlib.sha256(file.read_bytes() + gold_file.read_bytes()).hexdigest()
    return Task(name, split, questions, read_gold(name, gold_file), images, manifest["prompt_style"], fingerprint)


def _read_questions(file: Path) -> list[dict[str, Any]]:
    problems, seen = Problems(), set[int | str]()
    records = read_records(file)
    for where, record in records:
        problems.identifier(record, "question_id", file, where, seen)
        if "text" not in record:
            problems.add(file, where, "no field 'text'")
    problems.raise_if_any()
    return [record for _, record in records]


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
