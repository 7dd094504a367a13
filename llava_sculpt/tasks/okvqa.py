"""OK-VQA (a Source task): official VQA-format files -> prepared folder.

Expected under `raw`: `OpenEnded_mscoco_val2014_questions.json`, `mscoco_val2014_annotations.json`, images
`val2014/COCO_val2014_<12 digits>.jpg` -> `test`. If the two train2014 files are there too, a sample of them
-> `val`.
"""

from __future__ import annotations

from pathlib import Path

from llava_sculpt.tasks.common import (
    SHORT_ANSWER,
    Prepared,
    Record,
    Split,
    find_file,
    load_json,
    records_of,
    require_file,
    subset,
    write_prepared,
)
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import Question, asked_by, question_lines

_OFFICIAL_COUNTS = {"val": 9_009, "test": 5_046}


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
    """Prepare OK-VQA for evaluation; returns the manifest.

    `questions` is a question file for the test split (`asked_by`). UserError lists every malformed record.
    """
    problems = Problems()
    splits: dict[str, Split] = {}
    sources: list[Path] = [questions] if questions else []
    counts: dict[str, tuple[int, int | None]] = {}
    for split, year in (("val", "train2014"), ("test", "val2014")):
        names = [f"OpenEnded_mscoco_{year}_questions.json"], [f"mscoco_{year}_annotations.json"]
        if split == "val" and not all(find_file(raw, name) for name in names):
            continue
        files = [require_file(raw, name) for name in names]
        sources += files
        with problems.gather(files[0]):
            gold = _read_gold(files[1], problems)
            known = _read_questions(year, files[0], files[1], gold, problems)
            counts[split] = (len(known), _OFFICIAL_COUNTS[split])
            if split == "val":
                known = subset(known, val_samples, seed=seed, purpose="okvqa/val")
            elif questions:
                known = asked_by(questions, known, problems)
            lines = question_lines(raw, known, files[0], problems)
            splits[split] = Split(lines, {"annotations": [gold[line["question_id"]] for line in lines]})
    problems.raise_with_images()
    prepared = Prepared(
        image_folder=raw,
        prompt_style="short answer" + (f", test as in {questions.name}" if questions else ""),
        license="see https://okvqa.allenai.org; images under COCO's / Flickr's terms",
        sources=sources,
        options={"val_samples": val_samples},
        counts=counts,
        splits=splits,
    )
    return write_prepared(out, "okvqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _read_gold(annotations: Path, problems: Problems) -> dict[int, Record]:
    gold: dict[int, Record] = {}
    for number, record in enumerate(records_of(load_json(annotations, dict), "annotations", annotations)):
        where = f"annotation {number}"
        question_id = problems.value(record, "question_id", int, annotations, where)
        answers = problems.value(record, "answers", list, annotations, where)
        if question_id is None or answers is None:
            continue
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
    year: str, questions: Path, annotations: Path, gold: dict[int, Record], problems: Problems
) -> list[Question]:
    rows: dict[int, Question] = {}
    for number, record in enumerate(records_of(load_json(questions, dict), "questions", questions)):
        where = f"question {number}"
        question_id = problems.value(record, "question_id", int, questions, where)
        image_id = problems.value(record, "image_id", int, questions, where)
        text = problems.question(record, "question", questions, where)
        if question_id is None or image_id is None or text is None:
            continue
        if question_id in rows:
            problems.add(questions, where, f"question_id {question_id} occurs twice")
        else:
            name = f"{year}/COCO_{year}_{image_id:012d}.jpg"
            rows[question_id] = Question(question_id, (name, f"images/{name}"), text, text + SHORT_ANSWER)
    if not problems:  # otherwise a malformed record would be told twice, as itself and as missing
        for question_id in rows.keys() - gold.keys():
            problems.add(questions, f"question_id {question_id}", f"has no entry in {annotations.name}")
        for question_id in gold.keys() - rows.keys():
            problems.add(annotations, f"question_id {question_id}", f"has no question in {questions.name}")
    return [row for question_id, row in rows.items() if question_id in gold]
