"""TextVQA (a Source task): official v0.5.1 files -> prepared folder.

Expected under `raw`: `TextVQA_0.5.1_val.json` -> `test`; if `TextVQA_0.5.1_train.json` is there too, a sample
of it -> `val`. Images: `train_images/<image_id>.jpg`. With OCR tokens in the prompt (the default, as in
LLaVA's own evaluation) the matching `TextVQA_Rosetta_OCR_v0.2_{val,train}.json` must be there.
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

_OFFICIAL_COUNTS = {"val": 34_602, "test": 5_000}


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    ocr_tokens: bool = True,
    questions: Path | None = None,
    overwrite: bool = False,
) -> Record:
    """Prepare TextVQA for evaluation; returns the manifest.

    `ocr_tokens` puts the line "Reference OCR token: A, B" into the prompt. It changes scores by tens of
    points, so the choice is part of the manifest's prompt style. `questions` is a question file for the test
    split (`asked_by`), for example LLaVA's, whose prompts win over `ocr_tokens`. Raises UserError listing every
    malformed record, or naming the OCR file that is missing.
    """
    problems = Problems()
    splits: dict[str, Split] = {}
    sources: list[Path] = [questions] if questions else []
    counts: dict[str, tuple[int, int | None]] = {}
    for split, part in (("val", "train"), ("test", "val")):
        name = f"TextVQA_0.5.1_{part}.json"
        if split == "val" and find_file(raw, [name]) is None:
            continue
        file = require_file(raw, [name])
        sources.append(file)
        tokens: dict[str, list[str]] | None = None
        own_prompts = split == "val" or not questions
        if ocr_tokens and own_prompts:
            hint = "The option ocr_tokens is on and needs it; --no-ocr_tokens prompts without OCR."
            ocr_file = require_file(raw, [f"TextVQA_Rosetta_OCR_v0.2_{part}.json"], hint)
            sources.append(ocr_file)
            with problems.gather(ocr_file):
                tokens = _read_ocr(ocr_file, problems)
        with problems.gather(file):
            records = _read(file, problems)
            counts[split] = (len(records), _OFFICIAL_COUNTS[split])
            chosen = list(records)
            if split == "val":
                chosen = subset(chosen, val_samples, seed=seed, purpose="textvqa/val") if chosen else []
            known = [_question(question_id, records[question_id], tokens, file, problems) for question_id in chosen]
            if not own_prompts and questions:
                known = asked_by(questions, known, problems)
            lines = question_lines(raw, known, file, problems)
            splits[split] = Split(lines, {"data": [records[line["question_id"]] for line in lines]})
    problems.raise_with_images()
    style = "short answer, with OCR tokens" if ocr_tokens else "short answer, without OCR tokens"
    prepared = Prepared(
        image_folder=raw,
        prompt_style=f"test as in {questions.name}" if questions else style,
        license="CC BY 4.0 (annotations); images from Open Images",
        sources=sources,
        options={"ocr_tokens": ocr_tokens, "val_samples": val_samples},
        counts=counts,
        splits=splits,
    )
    return write_prepared(out, "textvqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _read_ocr(file: Path, problems: Problems) -> dict[str, list[str]]:
    tokens: dict[str, list[str]] = {}
    for number, record in enumerate(records_of(load_json(file, dict), "data", file)):
        image_id = problems.value(record, "image_id", str, file, f"record {number}")
        found = problems.texts(record, "ocr_tokens", file, f"record {number}", at_least=0)
        if image_id is not None:
            tokens[image_id] = found or []
    return tokens


def _read(file: Path, problems: Problems) -> dict[int, Record]:
    rows: dict[int, Record] = {}
    for number, record in enumerate(records_of(load_json(file, dict), "data", file)):
        where = f"record {number}"
        question_id = problems.value(record, "question_id", int, file, where)
        image_id = problems.value(record, "image_id", str, file, where)
        text = problems.question(record, "question", file, where)
        answers = problems.value(record, "answers", list, file, where)
        if question_id is None or image_id is None or text is None or answers is None:
            continue
        if len(answers) != 10 or any(not isinstance(answer, str) for answer in answers):
            problems.add(file, where, "needs exactly 10 answers, all text")
        elif question_id in rows:
            problems.add(file, where, f"question_id {question_id} occurs twice")
        else:
            rows[question_id] = record
    return rows


def _question(
    question_id: int, record: Record, tokens: dict[str, list[str]] | None, file: Path, problems: Problems
) -> Question:
    image_id, text = record["image_id"], record["question"]
    reference = ""
    if tokens is not None:
        if image_id not in tokens:
            problems.add(file, f"question_id {question_id}", f"no OCR tokens for image {image_id} in the OCR file")
        reference = f"\nReference OCR token: {', '.join(tokens.get(image_id, []))}"
    return Question(question_id, (f"train_images/{image_id}.jpg",), text, text + reference + SHORT_ANSWER)
