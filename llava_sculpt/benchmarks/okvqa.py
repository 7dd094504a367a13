"""OK-VQA (a Source task): official VQA-format files -> prepared folder.

Expected under `raw`: `OpenEnded_mscoco_val2014_questions.json`, `mscoco_val2014_annotations.json`, images
`val2014/COCO_val2014_<12 digits>.jpg` -> `test`. If the two train2014 files are there too, a sample of them
-> `val`.
"""

from __future__ import annotations

from pathlib import Path

from llava_sculpt.benchmarks.common import (
    SHORT_ANSWER,
    Prepared,
    Problems,
    Record,
    Split,
    find_file,
    load_json,
    question_line,
    records_of,
    require_file,
    subset,
    write_prepared,
)


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    overwrite: bool = False,
) -> Record:
    """Prepare OK-VQA for evaluation; returns the manifest. UserError lists every malformed record."""
    problems = Problems()
    splits: dict[str, Split] = {}
    sources: list[Path] = []
    for split, year in (("val", "train2014"), ("test", "val2014")):
        names = [f"OpenEnded_mscoco_{year}_questions.json"], [f"mscoco_{year}_annotations.json"]
        if split == "val" and not all(find_file(raw, name) for name in names):
            continue
        files = [require_file(raw, name) for name in names]
        sources += files
        limit = val_samples if split == "val" else None
        splits[split] = _read(raw, year, files[0], files[1], limit, seed, problems)
    problems.raise_if_any()
    prepared = Prepared(
        image_folder=raw,
        prompt_style="short answer",
        license="see https://okvqa.allenai.org; images under COCO's / Flickr's terms",
        sources=sources,
        options={"val_samples": val_samples},
        splits=splits,
    )
    return write_prepared(out, "okvqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _read(
    raw: Path, year: str, questions: Path, annotations: Path, limit: int | None, seed: int, problems: Problems
) -> Split:
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

    rows: dict[int, tuple[int, str]] = {}
    for number, record in enumerate(records_of(load_json(questions, dict), "questions", questions)):
        where = f"question {number}"
        question_id = problems.value(record, "question_id", int, questions, where)
        image_id = problems.value(record, "image_id", int, questions, where)
        text = problems.question(record, "question", questions, where)
        if question_id is None or image_id is None or text is None:
            continue
        if question_id in rows:
            problems.add(questions, where, f"question_id {question_id} occurs twice")
        elif question_id not in gold:
            problems.add(questions, where, f"question_id {question_id} has no entry in {annotations.name}")
        else:
            rows[question_id] = (image_id, text)
    for question_id in gold.keys() - rows.keys():
        problems.add(annotations, f"question_id {question_id}", f"has no question in {questions.name}")

    chosen = list(rows.items())
    if limit is not None:
        chosen = subset(chosen, limit, seed=seed, purpose="okvqa/val")
    lines: list[Record] = []
    for question_id, (image_id, text) in chosen:
        name = f"{year}/COCO_{year}_{image_id:012d}.jpg"
        image = problems.image(raw, [name, f"images/{name}"], questions, f"question_id {question_id}")
        lines.append(question_line(question_id, image or name, text + SHORT_ANSWER))
    return Split(lines, {"annotations": [gold[line["question_id"]] for line in lines]})
