"""OK-VQA (a Source task): official VQA-format files -> prepared folder.

Raw files: `OpenEnded_mscoco_val2014_questions.json`, `mscoco_val2014_annotations.json` and images
`val2014/COCO_val2014_<12 digits>.jpg` -> `test`; optionally those of train2014, a sample of them -> `val`.
"""

from __future__ import annotations

from pathlib import Path

from llava_sculpt.tasks.common import Record, load_json, records_of
from llava_sculpt.tasks.preparation import Preparation
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import SHORT_ANSWER, Question

_OFFICIAL_COUNTS = {"val": 9_009, "test": 5_046}


def prepare(job: Preparation) -> Record:
    """Prepare OK-VQA for evaluation; returns the manifest."""
    for split, year in (("val", "train2014"), ("test", "val2014")):
        names = f"OpenEnded_mscoco_{year}_questions.json", f"mscoco_{year}_annotations.json"
        if split == "val" and not all(job.find(name) for name in names):
            continue
        questions, annotations = (job.require(name) for name in names)
        with job.problems.gather(questions):
            gold = _read_gold(annotations, job.problems)
            known = _read_questions(year, questions, annotations, gold, job.problems)
            asked = job.ask(split, job.draw(split, known, _OFFICIAL_COUNTS[split]), questions)
            job.gold[split] = {"annotations": [gold[question.question_id] for question in asked]}
    return job.write("short answer", "see https://okvqa.allenai.org; images under COCO's / Flickr's terms")


def _read_gold(annotations: Path, problems: Problems) -> dict[int | str, Record]:
    gold: dict[int | str, Record] = {}
    for number, record in enumerate(records_of(load_json(annotations, dict), "annotations", annotations)):
        where = f"annotation {number}"
        row = problems.fields(record, annotations, where, question_id=int, answers=list)
        if row is None:
            continue
        question_id, answers = row
        if not answers:
            problems.add(annotations, where, "no answers")
        # An annotator may have typed nothing, so the text may be empty; it must be there.
        elif any(not isinstance(a, dict) or not isinstance(a.get("answer"), str) for a in answers):
            problems.add(annotations, where, "every answer needs a text under 'answer'")
        elif question_id in gold:
            problems.add(annotations, where, f"question_id {question_id} occurs twice")
        else:
            gold[question_id] = record
    return gold


def _read_questions(
    year: str, questions: Path, annotations: Path, gold: dict[int | str, Record], problems: Problems
) -> list[Question]:
    found: dict[int | str, Question] = {}
    for number, record in enumerate(records_of(load_json(questions, dict), "questions", questions)):
        where = f"question {number}"
        row = problems.fields(record, questions, where, question_id=int, image_id=int, question=str)
        if row is None:
            continue
        question_id, image_id, text = row
        if question_id in found:
            problems.add(questions, where, f"question_id {question_id} occurs twice")
        else:
            name = f"{year}/COCO_{year}_{image_id:012d}.jpg"
            found[question_id] = Question(question_id, (name, f"images/{name}"), text, text + SHORT_ANSWER)
    if not problems:  # otherwise a malformed record would be reported twice, as itself and as missing
        for question_id in found.keys() - gold.keys():
            problems.add(questions, f"question_id {question_id}", f"has no entry in {annotations.name}")
        for question_id in gold.keys() - found.keys():
            problems.add(annotations, f"question_id {question_id}", f"has no question in {questions.name}")
    return [question for question_id, question in found.items() if question_id in gold]
