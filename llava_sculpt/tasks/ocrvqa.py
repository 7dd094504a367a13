"""OCR-VQA (a Source task): official `dataset.json` -> prepared folder.

Expected under `raw`: `dataset.json` and `images/<id><extension of imageURL>`. Its split 2 -> `val`, split 3
-> `test`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from llava_sculpt.tasks.common import (
    SHORT_ANSWER,
    Prepared,
    Record,
    Split,
    require_file,
    subset,
    write_prepared,
)
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import Question, asked_by, question_lines
from llava_sculpt.tasks.stream import stream_records

_SPLITS = {1: "train", 2: "val", 3: "test"}
_OFFICIAL_BOOKS = 207_572


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    test_samples: int = 2_000,
    questions: Path | None = None,
    overwrite: bool = False,
) -> Record:
    """Prepare OCR-VQA for evaluation; returns the manifest.

    The paper scores 2,000 random questions of the test split; `test_samples` of them are drawn here with
    `seed`, or those of the question file `questions` are taken (`asked_by`). Question ids are
    `<image id>_<position of the question>`. Raises UserError listing every malformed record.
    """
    file = require_file(raw, ["dataset.json"])
    problems = Problems()
    found: dict[str, list[Question]] = {"val": [], "test": []}
    with problems.gather(file):
        books = _read(file, found, problems)
        if not found["test"]:
            problems.add(file, "", "no questions of split 3 (test)")
    problems.raise_if_any()

    splits: dict[str, Split] = {}
    for name, count in (("val", val_samples), ("test", test_samples)):
        if not found[name]:
            continue
        if name == "test" and questions:
            chosen = asked_by(questions, found[name], problems)
        else:
            chosen = subset(found[name], count, seed=seed, purpose=f"ocrvqa/{name}")
        gold = [{"question_id": question.question_id, "answer": question.answer} for question in chosen]
        splits[name] = Split(question_lines(raw, chosen, file, problems), gold)
    problems.raise_with_images()
    prepared = Prepared(
        image_folder=raw,
        prompt_style="short answer" + (f", test as in {questions.name}" if questions else ""),
        license="see https://ocr-vqa.github.io (research use)",
        sources=[file, *([questions] if questions else [])],
        options={"val_samples": val_samples, "test_samples": test_samples},
        counts={
            "books": (books, _OFFICIAL_BOOKS),
            **{name: (len(known), None) for name, known in found.items()},
        },
        splits=splits,
    )
    return write_prepared(out, "ocrvqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _read(file: Path, found: dict[str, list[Question]], problems: Problems) -> int:
    """Add the questions of val and test to `found`; returns the number of books. The file is streamed."""
    books = 0
    for image_id, record in stream_records(file):
        books += 1
        where = f"record {image_id}"
        split = problems.value(record, "split", int, file, where)
        url = problems.value(record, "imageURL", str, file, where)
        questions = problems.value(record, "questions", list, file, where)
        answers = problems.value(record, "answers", list, file, where)
        if split is None or url is None or questions is None or answers is None:
            continue
        if split not in _SPLITS:
            problems.add(file, where, f"split should be 1, 2 or 3, found {split}")
        elif len(questions) != len(answers):
            problems.add(file, where, f"{len(questions)} questions but {len(answers)} answers")
        elif _SPLITS[split] in found:
            image = f"images/{image_id}{PurePosixPath(urlsplit(url).path).suffix}"
            for number in range(len(questions)):
                at = f"{where}, question {number}"
                text = problems.question({"question": questions[number]}, "question", file, at)
                answer = problems.value({"answer": answers[number]}, "answer", str, file, at)
                if text is not None and answer is not None:
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
