"""IconQA, sub-task choose_txt (a Target task): official `iconqa_data.zip` -> prepared folder.

Raw files (the unpacked zip, with or without its top folder `iconqa_data/`): `pid_splits.json` and
`iconqa/{train,val,test}/choose_txt/<pid>/{data.json,image.png}`.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Literal

from llava_sculpt.errors import UserError
from llava_sculpt.tasks.common import Record, load_json
from llava_sculpt.tasks.preparation import Preparation
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import Question
from llava_sculpt.tasks.stream import stream_records

AnswerStyle = Literal["letter", "answer_letter", "text"]
INSTRUCTIONS = {
    "letter": "Answer with the option's letter from the given choices directly.",
    "text": "Answer with the text of the correct choice.",
}
_OFFICIAL_COUNTS = {"train": 18_946, "val": 6_316, "test": 6_316}


def prepare(
    job: Preparation,
    *,
    answer_style: Annotated[AnswerStyle, "training target and gold answer: B, Answer: B, or the text"] = "letter",
    instruction: Annotated[bool, "a last line that says how to answer"] = True,
) -> Record:
    """Prepare IconQA choose_txt; returns the manifest.

    The prompt is the question, one line `A. text` per choice, and the instruction. Training target and gold answer
    are the same, because the score is an exact match.
    """
    splits_file = job.require("pid_splits.json", "iconqa_data/pid_splits.json")
    root = splits_file.parent
    pids = load_json(splits_file, dict)
    drawn: dict[str, list[str]] = {}
    for split, official in _OFFICIAL_COUNTS.items():
        key = f"choose_txt_{split}"
        listed = job.problems.value(pids, key, list, splits_file, "")
        if listed is not None:
            names = [str(pid) for pid in listed]
            if len(set(names)) < len(names):
                job.problems.add(splits_file, key, "lists a problem id twice")
            drawn[split] = job.draw(split, names, official)
    job.problems.raise_if_any()
    for split, names in drawn.items():
        read = (_read(root, split, pid, answer_style, instruction, job.problems) for pid in names)
        rows = [row for row in read if row is not None]
        job.ask(split, rows, root / f"iconqa/{split}/choose_txt", images=root)
    style = f"choices, answer by {answer_style}" + ("" if instruction else ", no instruction")
    return job.write(style, "CC BY-NC-SA 4.0", images=root)


def _read(root: Path, split: str, pid: str, style: str, instruction: bool, problems: Problems) -> Question | None:
    """The question of one problem folder."""
    folder = f"iconqa/{split}/choose_txt"
    file, where = root / folder, f"{pid}/data.json"
    try:
        record = load_json(root / folder / pid / "data.json", dict)
    except UserError as error:
        problems.add(file, where, str(error))
        return None
    row = problems.fields(record, file, where, question=str, answer=int)
    choices = problems.texts(record, "choices", file, where, at_least=2)
    if row is None or choices is None:
        return None
    question, answer = row
    if len(choices) > len(ascii_uppercase):
        problems.add(file, where, f"{len(choices)} choices, but there are only 26 letters")
        return None
    if not 0 <= answer < len(choices):
        problems.add(file, where, f"answer {answer} is no index into the {len(choices)} choices")
        return None
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))]
    if instruction:
        lines.append(INSTRUCTIONS["text" if style == "text" else "letter"])
    gold = answer_text(style, choices, answer)
    return Question(pid, (f"{folder}/{pid}/image.png",), None, "\n".join(lines), gold)


def answer_text(style: str, choices: list[str], answer: int) -> str:
    """The gold answer of a problem in one of the answer styles."""
    letter = ascii_uppercase[answer]
    return {"letter": letter, "answer_letter": f"Answer: {letter}", "text": choices[answer]}[style]


def read_answers(path: Path, problems: Problems, answer_style: str) -> dict[int | str, str]:
    """The answers to choose_txt's test split of a `problems.json` by pid, for scoring (`evaluation.scorers.exact`)."""
    gold: dict[int | str, str] = {}
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
        gold[pid] = answer_text(answer_style, choices, answer)
    if not gold and not problems:
        problems.add(path, "", "no choose_txt problems of the test split")
    return gold
