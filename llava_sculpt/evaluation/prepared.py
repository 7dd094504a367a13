"""The prepared data that an evaluation asks about, read and checked before any model is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_sculpt.data.image_check import check_images, images_fingerprint
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.score_files import read_gold
from llava_sculpt.evaluation.scorers import scorer_of
from llava_sculpt.evaluation.scorers.scorer import Scorer
from llava_sculpt.names import METRICS, PAPER_TASKS, TASK_NAME, TASKS
from llava_sculpt.tasks.common import MANIFEST, read_manifest
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems


@dataclass(frozen=True)
class Task:
    """A split of a prepared data set, read and checked; `fingerprint` is of its questions and gold answers.

    `metric` is of one's own task; a benchmark has its official scorer.
    """

    name: str
    split: str
    metric: str | None
    questions: list[dict[str, Any]]
    gold: dict[Any, Any]
    image_folder: Path
    prompt_style: str
    fingerprint: str

    @property
    def scorer(self) -> Scorer:
        """What compares answers with `gold`."""
        return scorer_of(self.name, self.metric)

    @cached_property
    def images(self) -> str:
        """Fingerprint of the images asked about (`images_fingerprint`), each read whole, once.

        Raises:
            UserError: every image that cannot be used.
        """
        paths = {q["image"]: self.image_folder / q["image"] for q in self.questions if "image" in q}
        bad, hashes = check_images(paths.values())
        if bad:
            raise UserError([f"{path}: {problem} ({self.name})" for path, problem in bad.items()][:20])
        return images_fingerprint({name: hashes[path] for name, path in paths.items()})


def tasks_of(name: str, roots: Sequence[Path]) -> list[str]:
    """`all` (Targets and Sources), or a comma-separated list of task names, each once.

    Args:
        roots: where one's own tasks may have been prepared.

    Raises:
        UserError: a name that is no benchmark and no task of one's own.
    """
    names = list(PAPER_TASKS) if name == "all" else [part.strip() for part in name.split(",") if part.strip()]
    own = sorted({found for root in roots for found in own_tasks(root)})
    known = f"known: all, {', '.join([*TASKS, *own])}"
    problems = [] if names else [f"--tasks: empty; {known}"]
    for unknown in (part for part in names if part not in TASKS and part not in own):
        near = get_close_matches(unknown.lower(), [*TASKS, *own], 1)
        hint = f"did you mean {near[0]}?" if near else known
        if "/" in unknown or Path(unknown).is_dir():
            hint = f"it looks like a model, which --model takes; {known}"
        problems.append(f"--tasks: {unknown} is not a task; {hint}")
    if problems:
        raise UserError(problems)
    return list(dict.fromkeys(names))


def own_tasks(root: Path) -> list[str]:
    """The tasks of one's own that are prepared in `root`, in alphabetical order."""
    found = (file.parent.name for file in root.glob(f"*/{MANIFEST}"))
    return sorted(name for name in found if name not in TASKS and TASK_NAME.fullmatch(name))


def load_tasks(names: Sequence[str], data_root: Path, split: str) -> list[Task]:
    """Read the prepared data of every task in `names` from `data_root/<name>/`.

    Call it before loading a model: one UserError lists every task that is not prepared, lacks the split, has a
    malformed or changed file, or misses images. (Their content is read by `Task.images`.)
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


def _load_task(name: str, folder: Path, split: str) -> Task:
    if not (folder / MANIFEST).is_file():
        command = f"prepare {name} --raw raw/{name}" if name in TASKS else "prepare own --data FILE --images DIR"
        raise UserError(
            f"{folder}: {name} is not prepared; run: llava-sculpt {command} --out {folder} "
            "(data/README.md), or name the folder of the prepared data with --data_root"
        )
    manifest = read_manifest(folder, name)
    metric = None if name in TASKS else manifest.get("metric")
    if name not in TASKS and metric not in METRICS:
        raise UserError(f"{folder / MANIFEST}: metric: {metric!r} is not one of {', '.join(METRICS)}")
    scorer = scorer_of(name, metric)
    file, gold_file = folder / f"{split}.jsonl", folder / f"{split}_annotations.json"
    if not file.exists() or not gold_file.exists():
        have = ", ".join(s for s in manifest["splits"] if s != "train") or "none"
        raise UserError(f"{folder}: no split {split!r} (evaluation splits there: {have})")
    images = Path(os.path.realpath(folder / manifest["image_folder"]))
    questions, gold = _read_questions(file, images), read_gold(scorer, gold_file)
    contents = file.read_bytes(), gold_file.read_bytes()
    for part, content in zip((file, gold_file), contents, strict=True):
        known = manifest.get("files", {}).get(part.name)
        if known not in (None, hashlib.sha256(content).hexdigest()):
            raise UserError(
                f"{part}: not as it was prepared: prepare {name} again; if you changed it on purpose, take it out of "
                f'"files" in {folder / MANIFEST}'
            )
    try:  # whether questions and gold answers go together, before hours of answering
        scorer.score(gold, [(q["question_id"], "") for q in questions], "authors", "python")
    except UserError as error:
        raise UserError(
            [f"{gold_file} does not go with {file.name}: {problem}" for problem in error.problems]
        ) from error
    fingerprint = hashlib.sha256(b"".join(contents)).hexdigest()
    return Task(name, split, metric, questions, gold, images, manifest["prompt_style"], fingerprint)


def _read_questions(file: Path, images: Path) -> list[dict[str, Any]]:
    problems, seen = Problems(), set[int | str]()
    records = read_records(file)
    for where, record in records:
        problems.identifier(record, "question_id", file, where, seen)
        problems.question(record, "text", file, where)
        rounds = problems.value(record, "rounds", list, file, where) if "rounds" in record else None
        for said in rounds or ():
            pair = isinstance(said, list) and len(said) == 2 and all(isinstance(t, str) and t.strip() for t in said)
            if not pair or "<image>" in said[0]:
                problems.add(file, where, f"'rounds' should hold [question, answer], without <image>: {said!r:.60}")
        if "image" in record and (name := problems.value(record, "image", str, file, where)) is not None:
            problems.image(images, [name], file, where)
    problems.raise_if_any()
    return [record for _, record in records]
