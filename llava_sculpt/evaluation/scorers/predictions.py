"""Predictions in LLaVA's answers format or the benchmark's official one, and the questions they answer."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers.score import QuestionId
from llava_sculpt.tasks.common import load_json, records_of
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems, is_text

Pairs = list[tuple[QuestionId, str]]

# (id, text): LLaVA's answers, then the benchmark's own format.
_FIELDS = {
    "okvqa": (("question_id", "text"), ("question_id", "answer")),
    "textvqa": (("question_id", "text"), ("question_id", "answer")),
    "gqa": (("question_id", "text"), ("questionId", "prediction")),
    "ocrvqa": (("question_id", "text"), ("question_id", "answer")),
    "iconqa": (("question_id", "text"), ("question_id", "answer")),
    "coco": (("image_id", "caption"), ("question_id", "text")),
}


def read_predictions(benchmark: str, path: Path, gold: Any) -> tuple[Pairs, Any]:
    """(question id, text) of every prediction in `path`, and `gold` as these predictions are compared with it.

    JSON lines or one JSON list. TextVQA's question files of LLaVA use the image id as question id; such predictions
    are told apart by their prompt, as LLaVA's evaluator does, and get the annotation's question id. Raises one
    UserError with all malformed records.
    """
    problems = Problems()
    keys = _TextVQAKeys(gold) if benchmark == "textvqa" else None
    pairs: Pairs = []
    for where, record in read_records(path):
        id_key, text_key = next((f for f in _FIELDS[benchmark] if f[0] in record and f[1] in record), ("", ""))
        if not id_key:
            wanted = " or ".join(f"{a!r} and {b!r}" for a, b in _FIELDS[benchmark])
            problems.add(path, where, f"needs the fields {wanted}")
            continue
        question_id = problems.identifier(record, id_key, path, where)
        text = record[text_key]
        if not isinstance(text, str):
            problems.add(path, where, f"field {text_key!r} should be str, found {type(text).__name__}")
        elif not is_text(text):
            problems.add(path, where, f"field {text_key!r} holds half of a surrogate pair, which is not text")
        elif question_id is not None:
            if keys is not None and question_id in keys.images:
                asked = _question_of(record.get("prompt"))
                if asked is None:
                    problems.add(path, where, "the question id is an image id, but 'prompt' holds no question")
                    continue
                question_id = keys.question_id(str(question_id), asked)
            pairs.append((question_id, text))
    problems.raise_if_any()
    return pairs, gold if keys is None else keys.gold()


def read_question_ids(benchmark: str, path: Path, gold: Any) -> list[QuestionId]:
    """The ids asked by a question file: JSON lines of LLaVA (`question_id` or `id`), or the official file.

    Raises one UserError with all malformed records and every question without gold answers.
    """
    known = gold_ids(benchmark, gold)
    problems = Problems()
    keys = _TextVQAKeys(gold) if benchmark == "textvqa" else None
    asked: list[QuestionId] = []
    for where, record in _question_records(benchmark, path):
        question_id = problems.identifier(record, "id" if "question_id" not in record else "question_id", path, where)
        if question_id is None:
            continue
        if keys is not None and question_id in keys.images:
            question_id = keys.question_id(str(question_id), _question_of(record.get("text")) or "")
        if question_id not in known:
            problems.add(path, where, f"question {question_id!r} is not among the annotations")
        asked.append(question_id)
    twice = [question_id for question_id, count in Counter(asked).items() if count > 1]
    if twice:
        problems.add(path, "", f"{len(twice)} question ids occur more than once, the first: {twice[0]!r}")
    problems.raise_if_any()
    return asked


def gold_ids(benchmark: str, gold: Any) -> set[QuestionId]:
    """The ids that `gold` has answers for."""
    if benchmark == "gqa":
        return set(gold)
    if benchmark == "coco":
        return {image["id"] for image in gold["images"]}
    return {record["question_id"] for record in _records(benchmark, gold)}


def only(benchmark: str, gold: Any, ids: set[QuestionId]) -> Any:
    """`gold` of the questions `ids` alone."""
    if benchmark == "gqa":
        return {question_id: record for question_id, record in gold.items() if question_id in ids}
    if benchmark == "coco":
        return {
            "images": [image for image in gold["images"] if image["id"] in ids],
            "annotations": [a for a in gold["annotations"] if a["image_id"] in ids],
        }
    return _with_records(benchmark, gold, [r for r in _records(benchmark, gold) if r["question_id"] in ids])


def as_the_official_script(benchmark: str, gold: Any, pairs: Pairs) -> tuple[Any, Pairs]:
    """`gold` and predictions as the official script of `benchmark` counts missing, duplicate and unknown ids.

    OK-VQA and GQA: of duplicates the last counts; GQA ignores unknown ids. TextVQA, OCR-VQA, IconQA: every line of
    the predictions is one item, so duplicates count each (the k-th under the id `<id>#<k>`) and questions without a
    prediction do not count. What fails in the official script is left as it is, to be refused: COCO takes exactly
    one caption for each image.
    """
    if benchmark == "okvqa":
        return gold, list(dict(pairs).items())
    if benchmark == "gqa":
        return gold, [(question_id, text) for question_id, text in dict(pairs).items() if question_id in gold]
    if benchmark == "coco":
        return gold, pairs
    records = {record["question_id"]: record for record in _records(benchmark, gold)}
    lines: list[dict[str, Any]] = []
    renamed: Pairs = []
    count: Counter[QuestionId] = Counter()
    for question_id, text in pairs:
        count[question_id] += 1
        item = question_id if count[question_id] == 1 else f"{question_id}#{count[question_id]}"
        renamed.append((item, text))
        if question_id in records:
            lines.append({**records[question_id], "question_id": item})
    return _with_records(benchmark, gold, lines), renamed


class _TextVQAKeys:
    """Questions of TextVQA by (image id, question in lower case), the key of LLaVA's evaluator.

    Where several annotations have one key, the evaluator compares with the last of them: `gold` says so, and
    `question_id` hands out their ids one after the other.
    """

    def __init__(self, gold: Any) -> None:
        self._data: list[dict[str, Any]] = gold["data"]
        self._by_key: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in self._data:
            # (An annotation file of another make may have question ids and answers only.)
            if "image_id" in record and "question" in record:
                self._by_key.setdefault((record["image_id"], record["question"].lower()), []).append(record)
        self.images = {image_id for image_id, _ in self._by_key}
        self._given: Counter[tuple[str, str]] = Counter()

    def question_id(self, image_id: str, question: str) -> QuestionId:
        key = (image_id, question)
        if key not in self._by_key:
            return f"{image_id}: {question}"
        records = self._by_key[key]
        self._given[key] += 1
        found: QuestionId = records[min(self._given[key], len(records)) - 1]["question_id"]
        return found

    def gold(self) -> Any:
        asked = [same for key, same in self._by_key.items() if self._given[key]]
        last = {r["question_id"]: same[-1]["answers"] for same in asked for r in same}
        return {"data": [{**r, "answers": last.get(r["question_id"], r["answers"])} for r in self._data]}


def _question_of(prompt: Any) -> str | None:
    """The question in a prompt of LLaVA's TextVQA evaluation, in lower case; None where its evaluator fails."""
    if not isinstance(prompt, str):
        return None
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found.group(1).lower() if found else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def _question_records(benchmark: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    if path.suffix != ".json" or benchmark not in ("okvqa", "gqa", "textvqa"):
        return read_records(path)
    content = load_json(path, dict)
    if benchmark == "gqa":
        return [(f"question {question_id}", {"question_id": question_id}) for question_id in content]
    records = records_of(content, "questions" if benchmark == "okvqa" else "data", path)
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: every question should be an object")
    return [(f"question {n}", record) for n, record in enumerate(records)]


def _records(benchmark: str, gold: Any) -> list[dict[str, Any]]:
    key = {"okvqa": "annotations", "textvqa": "data"}.get(benchmark)
    records: list[dict[str, Any]] = gold[key] if key else gold
    return records


def _with_records(benchmark: str, gold: Any, records: list[dict[str, Any]]) -> Any:
    key = {"okvqa": "annotations", "textvqa": "data"}.get(benchmark)
    return {**gold, key: records} if key else records
