"""GQA (a Source task): official balanced question files -> prepared folder.

Expected under `raw` (or in its folder `questions/`): `testdev_balanced_questions.json` -> `test`; if
`val_balanced_questions.json` is there too, a sample of it -> `val`. Images: `images/<imageId>.jpg`.
"""

from __future__ import annotations

from pathlib import Path

from llava_sculpt.tasks.common import (
    SHORT_ANSWER,
    Prepared,
    Record,
    Split,
    find_file,
    require_file,
    subset,
    write_prepared,
)
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import Question, asked_by, question_lines
from llava_sculpt.tasks.stream import stream_records

_OFFICIAL_COUNTS = {"val": 132_062, "test": 12_578}

# What the scorer and a reader of per-question scores need; the scene-graph programs would be most of the
# file.
_KEPT = ("imageId", "question", "answer", "fullAnswer", "isBalanced", "types")


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    questions: Path | None = None,
    overwrite: bool = False,
) -> Record:
    """Prepare GQA for evaluation; returns the manifest.

    `questions` is a question file for the test split (`asked_by`). UserError lists every malformed record.
    """
    problems = Problems()
    splits: dict[str, Split] = {}
    sources: list[Path] = [questions] if questions else []
    counts: dict[str, tuple[int, int | None]] = {}
    for split, name in (("val", "val_balanced_questions.json"), ("test", "testdev_balanced_questions.json")):
        places = [name, f"questions/{name}"]
        if split == "val" and find_file(raw, places) is None:
            continue
        file = require_file(raw, places)
        sources.append(file)
        with problems.gather(file):
            ids = _check(file, problems)
            counts[split] = (len(ids), _OFFICIAL_COUNTS[split])
            if split == "val" and ids:
                ids = subset(ids, val_samples, seed=seed, purpose="gqa/val")
            known, gold = _read(file, set(ids))
            if split == "test" and questions:
                known = asked_by(questions, known, problems)
            lines = question_lines(raw, known, file, problems)
            splits[split] = Split(lines, {line["question_id"]: gold[line["question_id"]] for line in lines})
    problems.raise_with_images()
    prepared = Prepared(
        image_folder=raw,
        prompt_style="short answer" + (f", test as in {questions.name}" if questions else ""),
        license="CC BY 4.0",
        sources=sources,
        options={"val_samples": val_samples},
        counts=counts,
        splits=splits,
    )
    return write_prepared(out, "gqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _check(file: Path, problems: Problems) -> list[str]:
    """The ids of the well-formed questions. The file may hold a million: nothing else of them is kept."""
    ids: dict[str, None] = {}
    for question_id, record in stream_records(file):
        where = f"question {question_id}"
        fields = [
            problems.question(record, "question", file, where),
            problems.value(record, "imageId", str, file, where),
            problems.value(record, "answer", str, file, where),
            problems.value(record, "isBalanced", bool, file, where),
        ]
        types = problems.value(record, "types", dict, file, where)
        fields.append(problems.value(types, "structural", str, file, where) if types is not None else None)
        if question_id in ids:
            problems.add(file, where, "occurs twice")
        elif None not in fields:
            ids[question_id] = None
    return list(ids)


def _read(file: Path, wanted: set[str]) -> tuple[list[Question], dict[str, Record]]:
    """The questions `wanted` and their gold answers, in a second pass over the file."""
    known: list[Question] = []
    gold: dict[str, Record] = {}
    for question_id, record in stream_records(file):
        if question_id in wanted:
            text = record["question"]
            known.append(Question(question_id, (f"images/{record['imageId']}.jpg",), text, text + SHORT_ANSWER))
            gold[question_id] = {key: record[key] for key in _KEPT if key in record}
    return known, gold
