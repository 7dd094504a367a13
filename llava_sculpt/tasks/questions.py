"""The questions of an evaluation split: those of the official file, or those of a given question file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # ends the prompts of the Source tasks


class Question(NamedTuple):
    """A question of an official file.

    `images` are the possible paths of its image below the image folder, `text` the bare question (None for captions),
    `prompt` what the model is asked, `answer` the gold answer of benchmarks that have a single one.
    """

    question_id: int | str
    images: tuple[str, ...]
    text: str | None
    prompt: str
    answer: str = ""


def read_question_file(file: Path, known: Sequence[Question], problems: Problems) -> list[Question]:
    """The questions of a LLaVA question file, in its order, with its prompts and (where it has one) its answers.

    Each line {"question_id" or "id", "image", "text"} is looked up among `known` by its id, or else by its image and
    the first line of its text: LLaVA's TextVQA file has image ids for question ids. Unknown questions are noted.
    """
    by_id = {str(question.question_id): question for question in known}
    by_text = {(_image_key(question.images[0]), _first_line(question.text)): question for question in known}
    chosen: dict[int | str, Question] = {}
    for where, record in read_records(file):
        question_id = problems.identifier(record, "id" if "question_id" not in record else "question_id", file, where)
        image = problems.value(record, "image", str, file, where)
        prompt = problems.question(record, "text", file, where)
        answer = problems.value(record, "answer", str, file, where) if "answer" in record else ""
        if question_id is None or image is None or prompt is None or answer is None:
            continue
        key = _image_key(image)
        found = by_id.get(str(question_id))
        if found is None or _image_key(found.images[0]) != key:
            # Where every image has one question its text does not matter.
            found = by_text.get((key, _first_line(prompt))) or by_text.get((key, ""))
        if found is None:
            problems.add(file, where, f"question {question_id!r} about {image} is not in the official file")
        elif found.question_id in chosen:
            problems.add(file, where, f"question {question_id!r} about {image} occurs twice")
        else:
            chosen[found.question_id] = found._replace(prompt=prompt, answer=answer or found.answer)
    return list(chosen.values())


def question_lines(raw: Path, chosen: Sequence[Question], file: Path, problems: Problems) -> list[dict[str, Any]]:
    """Lines of LLaVA's question file, without "<image>", which the loader adds. Missing images are noted."""
    lines = []
    for question in chosen:
        image = problems.image(raw, question.images, file, f"question {question.question_id}")
        name = image or question.images[0]
        line = {"question_id": question.question_id, "image": name, "text": question.prompt, "category": "default"}
        lines.append(line)
    return lines


def _image_key(image: str) -> str:
    """What names a picture in any folder layout: its file name, or for IconQA (all "image.png") its folder's."""
    path = PurePosixPath(image)
    return path.parent.name if path.stem == "image" else path.stem


def _first_line(text: str | None) -> str:
    return "" if text is None else text.strip().split("\n")[0].strip().lower()
