"""Gold answers from the official annotation files, checked record by record, in the form the scorers take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.tasks.common import load_json, records_of
from llava_sculpt.tasks.iconqa import answer_text
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.stream import stream_records

Record = dict[str, Any]


def read_gold(benchmark: str, path: Path, answer_style: str = "letter") -> Any:
    """The gold answers of `benchmark` as its scorer takes them.

    Accepted: the official file of the benchmark, our `test_annotations.json`, and what the authors of the paper use.
    `answer_style` (see `benchmarks.iconqa.prepare`) is what an answer to IconQA's own problems.json looks like.
    Raises one UserError with every malformed record.
    """
    problems = Problems()
    if not path.is_file():
        raise UserError(f"{path}: file not found (annotations of {benchmark})")
    gold = _READERS[benchmark](path, problems, answer_style)
    problems.raise_if_any()
    return gold


def _okvqa(path: Path, problems: Problems, _: str) -> Record:
    """VQA format: {"annotations": [{"question_id", "answers": [{"answer", ...}]}]}."""
    seen: set[int | str] = set()
    records = records_of(load_json(path, dict), "annotations", path)
    for number, record in enumerate(records):
        where = f"annotation {number}"
        problems.identifier(record, "question_id", path, where, seen)
        answers = problems.value(record, "answers", list, path, where)
        if answers is not None and not answers:
            problems.add(path, where, "no answers")
        # An annotator may have typed nothing, so the text may be empty; it must be there.
        elif any(not isinstance(a, dict) or not isinstance(a.get("answer"), str) for a in answers or ()):
            problems.add(path, where, "every answer needs a text under 'answer'")
    return {"annotations": records}


def _textvqa(path: Path, problems: Problems, _: str) -> Record:
    """{"data": [{"question_id", "image_id", "question", "answers": [10 texts]}]}."""
    seen: set[int | str] = set()
    records = records_of(load_json(path, dict), "data", path)
    for number, record in enumerate(records):
        where = f"record {number}"
        problems.identifier(record, "question_id", path, where, seen)
        problems.value(record, "image_id", str, path, where)
        problems.value(record, "question", str, path, where)
        answers = problems.value(record, "answers", list, path, where)
        if answers is not None and (len(answers) != 10 or not all(isinstance(a, str) for a in answers)):
            problems.add(path, where, "needs exactly 10 answers, all text")
    return {"data": records}


def _gqa(path: Path, problems: Problems, _: str) -> Record:
    """{question id: {"answer", "isBalanced", "types": {"structural"}}}."""
    gold: Record = {}
    for question_id, record in stream_records(path):
        where = f"question {question_id}"
        answer = problems.value(record, "answer", str, path, where)
        balanced = problems.value(record, "isBalanced", bool, path, where)
        types = problems.value(record, "types", dict, path, where)
        structural = problems.value(types, "structural", str, path, where) if types is not None else None
        gold[question_id] = {"answer": answer, "isBalanced": balanced, "types": {"structural": structural}}
    return gold


def _ocrvqa(path: Path, problems: Problems, _: str) -> list[Record]:
    """The official dataset.json (its test split; ids `<book>_<position>`), or [{"question_id", "answer"}]."""
    if not _holds_object(path):
        return _answers(path, problems)
    gold: list[Record] = []
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
        gold += [{"question_id": f"{book}_{n}", "answer": answer} for n, answer in enumerate(answers)]
    if not gold and not problems:
        problems.add(path, "", "no questions of split 3 (test)")
    return gold


def _iconqa(path: Path, problems: Problems, answer_style: str) -> list[Record]:
    """The official problems.json (choose_txt of its test split; ids are pids), or [{"question_id", "answer"}]."""
    if not _holds_object(path):
        return _answers(path, problems)
    gold: list[Record] = []
    for pid, record in stream_records(path):
        where = f"problem {pid}"
        kind = problems.value(record, "ques_type", str, path, where)
        split = problems.value(record, "split", str, path, where)
        if kind != "choose_txt" or split != "test":
            continue
        choices = problems.texts(record, "choices", path, where, at_least=2)
        answer = problems.value(record, "answer", int, path, where)
        if choices is None or answer is None:
            continue
        if not 0 <= answer < len(choices):
            problems.add(path, where, f"answer {answer} is no index into the {len(choices)} choices")
            continue
        gold.append({"question_id": pid, "answer": answer_text(answer_style, choices, answer)})
    if not gold and not problems:
        problems.add(path, "", "no choose_txt problems of the test split")
    return gold


def _coco(path: Path, problems: Problems, _: str) -> Record:
    """{"images": [{"id"}], "annotations": [{"image_id", "caption"}]}, or the test split of Karpathy's file."""
    content = load_json(path, dict)
    images: list[Record] = []
    captions: list[Record] = []
    seen: set[int | str] = set()
    karpathy = "annotations" not in content
    for number, record in enumerate(records_of(content, "images", path)):
        where = f"image {number}"
        if not karpathy:
            images.append({"id": problems.identifier(record, "id", path, where, seen)})
            continue
        image_id = problems.identifier(record, "cocoid", path, where, seen)
        split = problems.value(record, "split", str, path, where)
        sentences = problems.value(record, "sentences", list, path, where)
        if split == "test" and sentences is not None:
            images.append({"id": image_id})
            for position, sentence in enumerate(sentences):
                text = problems.value(sentence, "raw", str, path, f"{where}, sentence {position}")
                captions.append({"image_id": image_id, "caption": text})
    if karpathy and not images:
        problems.add(path, "", "no images of split 'test'")
    for number, record in enumerate([] if karpathy else records_of(content, "annotations", path)):
        where = f"annotation {number}"
        image_id = problems.identifier(record, "image_id", path, where)
        # A reference may be empty: it is one, and the official tokenizer takes it.
        text = record.get("caption") if isinstance(record, dict) else ""
        if not isinstance(text, str):
            problems.add(path, where, "needs a text under 'caption'")
        elif image_id is not None and image_id not in seen:
            problems.add(path, where, f"image_id {image_id} is not among the images")
        captions.append({"image_id": image_id, "caption": text})
    return {"images": images, "annotations": captions}


def _answers(path: Path, problems: Problems) -> list[Record]:
    """A list or JSON lines of {"question_id", "answer"}; the authors' question files are such."""
    seen: set[int | str] = set()
    gold: list[Record] = []
    for where, record in read_records(path):
        question_id = problems.identifier(record, "question_id", path, where, seen)
        answer = problems.value(record, "answer", str, path, where)
        gold.append({"question_id": question_id, "answer": answer})
    return gold


def _holds_object(path: Path) -> bool:
    """Whether a file is one JSON object with an object in it (an official file), not a list or JSON lines."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            head = stream.read(1 << 16).split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    text = "".join(head)
    return text.startswith("{") and text.partition(":")[2].startswith("{")


_READERS: dict[str, Callable[[Path, Problems, str], Any]] = {
    "okvqa": _okvqa,
    "ocrvqa": _ocrvqa,
    "gqa": _gqa,
    "textvqa": _textvqa,
    "iconqa": _iconqa,
    "coco": _coco,
}
