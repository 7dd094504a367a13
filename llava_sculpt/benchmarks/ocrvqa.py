"""OCR-VQA (a Source task): official `dataset.json` -> prepared folder.

Expected under `raw`: `dataset.json` and `images/<id><extension of imageURL>`. Its split 2 -> `val`, split 3
-> `test`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from llava_sculpt.benchmarks.common import (
    SHORT_ANSWER,
    Prepared,
    Problems,
    Record,
    Split,
    load_json,
    question_line,
    require_file,
    subset,
    write_prepared,
)

_SPLITS = {1: "train", 2: "val", 3: "test"}


class _Question(NamedTuple):
    question_id: str
    image_name: str
    text: str
    answer: str


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    test_samples: int = 2_000,
    overwrite: bool = False,
) -> Record:
    """Prepare OCR-VQA for evaluation; returns the manifest.

    The paper scores 2,000 random questions of the test split; `test_samples` of them are drawn here with
    `seed`. Question ids are `<image id>_<position of the question>`. Raises UserError listing every malformed
    record.
    """
    file = require_file(raw, ["dataset.json"])
    problems = Problems()
    found: dict[str, list[_Question]] = {"val": [], "test": []}
    for image_id, record in load_json(file, dict).items():
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
            image = f"{image_id}{PurePosixPath(urlsplit(url).path).suffix}"
            for number in range(len(questions)):
                at = f"{where}, question {number}"
                text = problems.question({"question": questions[number]}, "question", file, at)
                answer = problems.value({"answer": answers[number]}, "answer", str, file, at)
                if text is not None and answer is not None:
                    found[_SPLITS[split]].append(_Question(f"{image_id}_{number}", image, text, answer))
    if not found["test"]:
        problems.add(file, "", "no questions of split 3 (test)")
    problems.raise_if_any()

    splits: dict[str, Split] = {}
    for name, count in (("val", val_samples), ("test", test_samples)):
        if found[name]:
            chosen = subset(found[name], count, seed=seed, purpose=f"ocrvqa/{name}")
            splits[name] = _split(raw, chosen, file, problems)
    problems.raise_if_any()
    prepared = Prepared(
        image_folder=raw,
        prompt_style="short answer",
        license="see https://ocr-vqa.github.io (research use)",
        sources=[file],
        options={"val_samples": val_samples, "test_samples": test_samples},
        splits=splits,
    )
    return write_prepared(out, "ocrvqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _split(raw: Path, chosen: list[_Question], file: Path, problems: Problems) -> Split:
    lines: list[Record] = []
    for question in chosen:
        name = f"images/{question.image_name}"
        image = problems.image(raw, [name], file, f"question {question.question_id}")
        lines.append(question_line(question.question_id, image or name, question.text + SHORT_ANSWER))
    return Split(lines, [{"question_id": q.question_id, "answer": q.answer} for q in chosen])
