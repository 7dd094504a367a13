"""TextVQA (a Source task): official v0.5.1 files -> prepared folder.

Raw files: `TextVQA_0.5.1_val.json` -> `test`; optionally `TextVQA_0.5.1_train.json`, a sample of it -> `val`.
Images: `train_images/<image_id>.jpg`. With OCR tokens in the prompt (the default, as in LLaVA's own evaluation) the
matching `TextVQA_Rosetta_OCR_v0.2_{val,train}.json` must be there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from llava_sculpt.tasks.common import Record, load_json, records_of
from llava_sculpt.tasks.preparation import Preparation
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import SHORT_ANSWER, Question

_OFFICIAL_COUNTS = {"val": 34_602, "test": 5_000}


def prepare(
    job: Preparation, *, ocr_tokens: Annotated[bool, "the images' OCR tokens in the prompt, as in LLaVA"] = True
) -> Record:
    """Prepare TextVQA for evaluation; returns the manifest.

    `ocr_tokens` adds the line "Reference OCR token: A, B" to the prompt. It changes scores by tens of points, so it is
    part of the manifest's prompt style. A question file's prompts are used as they are.
    """
    for split, part in (("val", "train"), ("test", "val")):
        name = f"TextVQA_0.5.1_{part}.json"
        if split == "val" and not job.find(name):
            continue
        file = job.require(name)
        tokens: dict[str, list[str]] | None = None
        if ocr_tokens and not (split == "test" and job.questions):
            hint = "The option ocr_tokens is on and needs it; --no-ocr_tokens prompts without OCR."
            ocr_file = job.require(f"TextVQA_Rosetta_OCR_v0.2_{part}.json", hint=hint)
            with job.problems.gather(ocr_file):
                tokens = _read_ocr(ocr_file, job.problems)
        with job.problems.gather(file):
            records = _read(file, job.problems)
            ids = job.draw(split, list(records), _OFFICIAL_COUNTS[split])
            drawn = [_question(records[question_id], tokens, file, job.problems) for question_id in ids]
            job.gold[split] = {"data": [records[q.question_id] for q in job.ask(split, drawn, file)]}
    style = "" if job.questions else f"short answer, {'with' if ocr_tokens else 'without'} OCR tokens"
    return job.write(style, "CC BY 4.0 (annotations); images from Open Images")


def _read_ocr(file: Path, problems: Problems) -> dict[str, list[str]]:
    tokens: dict[str, list[str]] = {}
    for number, record in enumerate(records_of(load_json(file, dict), "data", file)):
        image_id = problems.value(record, "image_id", str, file, f"record {number}")
        found = problems.texts(record, "ocr_tokens", file, f"record {number}", at_least=0)
        if image_id is not None:
            tokens[image_id] = found or []
    return tokens


def _read(file: Path, problems: Problems) -> dict[int | str, Record]:
    found: dict[int | str, Record] = {}
    for number, record in enumerate(records_of(load_json(file, dict), "data", file)):
        where = f"record {number}"
        row = problems.fields(record, file, where, question_id=int, image_id=str, question=str, answers=list)
        if row is None:
            continue
        question_id, _, _, answers = row
        if len(answers) != 10 or any(not isinstance(answer, str) for answer in answers):
            problems.add(file, where, "needs exactly 10 answers, all text")
        elif question_id in found:
            problems.add(file, where, f"question_id {question_id} occurs twice")
        else:
            found[question_id] = record
    return found


def _question(record: Record, tokens: dict[str, list[str]] | None, file: Path, problems: Problems) -> Question:
    question_id, image_id, text = record["question_id"], record["image_id"], record["question"]
    reference = ""
    if tokens is not None:
        if image_id not in tokens:
            problems.add(file, f"question_id {question_id}", f"no OCR tokens for image {image_id} in the OCR file")
        reference = f"\nReference OCR token: {', '.join(tokens.get(image_id, []))}"
    return Question(question_id, (f"train_images/{image_id}.jpg",), text, text + reference + SHORT_ANSWER)
