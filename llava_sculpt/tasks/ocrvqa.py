"""OCR-VQA (a Source task): official `dataset.json` -> prepared folder.

Raw files: `dataset.json`, whose split 2 -> `val` and split 3 -> `test`, and `images/<id><extension of imageURL>`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit

from llava_sculpt.tasks.common import Record
from llava_sculpt.tasks.preparation import Preparation
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import SHORT_ANSWER, Question
from llava_sculpt.tasks.stream import stream_records

_SPLITS = {1: "train", 2: "val", 3: "test"}
_OFFICIAL_BOOKS = 207_572


def prepare(job: Preparation, *, test_samples: Annotated[int, "random test questions"] = 2_000) -> Record:
    """Prepare OCR-VQA for evaluation; returns the manifest.

    The paper scores 2,000 random questions of the test split. Question ids are `<image id>_<position>`.
    """
    file = job.require("dataset.json")
    found: dict[str, list[Question]] = {"val": [], "test": []}
    with job.problems.gather(file):
        job.count("books", _read(file, found, job.problems), _OFFICIAL_BOOKS)
        if not found["test"]:
            job.problems.add(file, "", "no questions of split 3 (test)")
    job.problems.raise_if_any()
    for split, known in found.items():
        drawn = job.draw(split, known, None, None if job.questions else test_samples)
        if known:
            job.ask(split, drawn, file)
    return job.write("short answer", "see https://ocr-vqa.github.io (research use)")


def _read(file: Path, found: dict[str, list[Question]], problems: Problems) -> int:
    """Add the questions of val and test to `found`; returns the number of books. The file is streamed."""
    books = 0
    for image_id, record in stream_records(file):
        books += 1
        where = f"record {image_id}"
        row = problems.fields(record, file, where, split=int, imageURL=str, questions=list, answers=list)
        if row is None:
            continue
        split, url, questions, answers = row
        if split not in _SPLITS:
            problems.add(file, where, f"split should be 1, 2 or 3, found {split}")
        elif len(questions) != len(answers):
            problems.add(file, where, f"{len(questions)} questions but {len(answers)} answers")
        elif _SPLITS[split] in found:
            image = f"images/{image_id}{PurePosixPath(urlsplit(url).path).suffix}"
            for number, pair in enumerate(zip(questions, answers, strict=True)):
                asked = dict(zip(("question", "answer"), pair, strict=True))
                texts = problems.fields(asked, file, f"{where}, question {number}", question=str, answer=str)
                if texts is not None:
                    text, answer = texts
                    question = Question(f"{image_id}_{number}", (image,), text, text + SHORT_ANSWER, answer)
                    found[_SPLITS[split]].append(question)
    return books


def read_answers(path: Path, problems: Problems, answer_style: str) -> dict[int | str, str]:
    """The answers to the test split of a `dataset.json` by question id, for scoring (`evaluation.scorers.exact`)."""
    gold: dict[int | str, str] = {}
    for book, record in stream_records(path):
        where = f"record {book}"
        split = problems.value(record, "split", int, path, where)
        questions = problems.value(record, "questions", list, path, where)
        answers = problems.value(record, "answers", list, path, where)
        if questions is None or answers is None or split != 3:
            continue
        if len(questions) != len(answers) or not all(isinstance(answer, str) for answer in answers):
            problems.add(path, where, "needs one answer, a text, for each question")
            continue
        gold |= {f"{book}_{n}": answer for n, answer in enumerate(answers)}
    if not gold and not problems:
        problems.add(path, "", "no questions of split 3 (test)")
    return gold
