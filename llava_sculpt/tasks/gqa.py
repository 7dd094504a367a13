"""GQA (a Source task): official balanced question files -> prepared folder.

Raw files, also in the folder `questions/`: `testdev_balanced_questions.json` -> `test`; optionally
`val_balanced_questions.json`, a sample of it -> `val`. Images: `images/<imageId>.jpg`.
"""

from __future__ import annotations

from pathlib import Path

from llava_sculpt.tasks.common import Record
from llava_sculpt.tasks.preparation import Preparation
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import SHORT_ANSWER, Question
from llava_sculpt.tasks.stream import stream_records

_OFFICIAL_COUNTS = {"val": 132_062, "test": 12_578}

# What the scorer and a reader of per-question scores need; the scene-graph programs would be most of the file.
_KEPT = ("imageId", "question", "answer", "fullAnswer", "isBalanced", "types")


def prepare(job: Preparation) -> Record:
    """Prepare GQA for evaluation; returns the manifest."""
    for split, name in (("val", "val_balanced_questions.json"), ("test", "testdev_balanced_questions.json")):
        places = name, f"questions/{name}"
        if split == "val" and not job.find(*places):
            continue
        file = job.require(*places)
        with job.problems.gather(file):
            drawn = job.draw(split, _check(file, job.problems), _OFFICIAL_COUNTS[split])
            known, gold = _read(file, set(drawn))
            job.gold[split] = {q.question_id: gold[q.question_id] for q in job.ask(split, known, file)}
    return job.write("short answer", "CC BY 4.0")


def _check(file: Path, problems: Problems) -> list[str]:
    """The ids of the well-formed questions. The file may hold a million: nothing else of them is kept."""
    ids: dict[str, None] = {}
    for question_id, record in stream_records(file):
        where = f"question {question_id}"
        row = problems.fields(record, file, where, question=str, imageId=str, answer=str, isBalanced=bool, types=dict)
        structural = problems.value(row[-1], "structural", str, file, where) if row else None
        if question_id in ids:
            problems.add(file, where, "occurs twice")
        elif structural:
            ids[question_id] = None
    return list(ids)


def _read(file: Path, wanted: set[str]) -> tuple[list[Question], dict[int | str, Record]]:
    """The questions `wanted` and their gold answers, in a second pass over the file."""
    known: list[Question] = []
    gold: dict[int | str, Record] = {}
    for question_id, record in stream_records(file):
        if question_id in wanted:
            text = record["question"]
            known.append(Question(question_id, (f"images/{record['imageId']}.jpg",), text, text + SHORT_ANSWER))
            gold[question_id] = {key: record[key] for key in _KEPT if key in record}
    return known, gold
