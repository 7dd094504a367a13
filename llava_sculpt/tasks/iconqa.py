"""IconQA, sub-task choose_txt (a Target task): official `iconqa_data.zip` -> prepared folder.

Expected under `raw` (the unpacked zip, with or without its top folder `iconqa_data/`):
`pid_splits.json` and `iconqa/{train,val,test}/choose_txt/<pid>/{data.json,image.png}`.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase

from llava_sculpt.errors import UserError
from llava_sculpt.tasks.common import (
    Prepared,
    Record,
    Split,
    load_json,
    require_file,
    subset,
    train_record,
    write_prepared,
)
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import Question, asked_by, question_lines
from llava_sculpt.tasks.stream import stream_records

ANSWER_STYLES = ("letter", "answer_letter", "text")
INSTRUCTIONS = {
    "letter": "Answer with the option's letter from the given choices directly.",
    "text": "Answer with the text of the correct choice.",
}
_OFFICIAL_COUNTS = {"train": 18_946, "val": 6_316, "test": 6_316}


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    answer_style: str = "letter",
    instruction: bool = True,
    questions: Path | None = None,
    overwrite: bool = False,
) -> Record:
    """Prepare IconQA choose_txt; returns the manifest.

    The prompt is the question, one line `A. text` per choice, and with `instruction` a last line that says how to
    answer. `answer_style` is the training target and the gold answer, which always agree, because the score is an
    exact match: "letter" is `B`, "answer_letter" `Answer: B`, "text" the text of the choice. `questions` is a question
    file for the test split (`asked_by`). Raises UserError listing every malformed record.
    """
    if answer_style not in ANSWER_STYLES:
        raise UserError(f"answer_style must be one of {', '.join(ANSWER_STYLES)}, got {answer_style!r}")
    splits_file = require_file(raw, ["pid_splits.json", "iconqa_data/pid_splits.json"])
    root = splits_file.parent
    pids = load_json(splits_file, dict)
    problems = Problems()
    chosen: dict[str, list[str]] = {}
    counts: dict[str, tuple[int, int | None]] = {}
    for split, count in (("train", samples), ("val", val_samples), ("test", None)):
        key = f"choose_txt_{split}"
        listed = problems.value(pids, key, list, splits_file, "")
        if listed is not None:
            names = [str(pid) for pid in listed]
            if len(set(names)) < len(names):
                problems.add(splits_file, key, "lists a problem id twice")
            counts[split] = (len(names), _OFFICIAL_COUNTS[split])
            chosen[split] = names if count is None else subset(names, count, seed=seed, purpose=f"iconqa/{split}")
    problems.raise_if_any()

    good: dict[str, list[Question]] = {}
    for split, names in chosen.items():
        rows = [_read(root, split, pid, answer_style, instruction, problems) for pid in names]
        good[split] = [row for row in rows if row is not None]
    if questions is not None:
        with problems.gather(questions):
            good["test"] = asked_by(questions, good["test"], problems)
    lines = {
        split: question_lines(root, rows, root / f"iconqa/{split}/choose_txt", problems) for split, rows in good.items()
    }
    problems.raise_with_images()
    train = [
        train_record(f"iconqa_{row.question_id}", line["image"], row.prompt, row.answer)
        for row, line in zip(good["train"], lines["train"], strict=True)
    ]
    splits = {
        split: Split(lines[split], [{"question_id": row.question_id, "answer": row.answer} for row in good[split]])
        for split in ("val", "test")
    }
    prepared = Prepared(
        image_folder=root,
        prompt_style=f"choices, answer by {answer_style}"
        + ("" if instruction else ", no instruction")
        + ("" if questions is None else f", test as in {questions.name}"),
        license="CC BY-NC-SA 4.0",
        sources=[splits_file, *([questions] if questions else [])],
        options={"answer_style": answer_style, "instruction": instruction, "val_samples": val_samples},
        counts=counts,
        train=train,
        splits=splits,
    )
    return write_prepared(out, "iconqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _read(root: Path, split: str, pid: str, style: str, instruction: bool, problems: Problems) -> Question | None:
    """The question of one problem folder."""
    folder = f"iconqa/{split}/choose_txt"
    file, where = root / folder, f"{pid}/data.json"
    try:
        record = load_json(root / folder / pid / "data.json", dict)
    except UserError as error:
        problems.add(file, where, str(error))
        return None
    question = problems.question(record, "question", file, where)
    choices = problems.texts(record, "choices", file, where, at_least=2)
    answer = problems.value(record, "answer", int, file, where)
    if question is None or choices is None or answer is None:
        return None
    if len(choices) > len(ascii_uppercase):
        problems.add(file, where, f"{len(choices)} choices, but there are only 26 letters")
        return None
    if not 0 <= answer < len(choices):
        problems.add(file, where, f"answer {answer} is no index into the {len(choices)} choices")
        return None
    options = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    prompt = "\n".join(
        [question, *options, *([INSTRUCTIONS["text" if style == "text" else "letter"]] if instruction else [])]
    )
    gold = answer_text(style, choices, answer)
    return Question(pid, (f"{folder}/{pid}/image.png",), None, prompt, gold)


def answer_text(style: str, choices: list[str], answer: int) -> str:
    """The gold answer of a problem in one of ANSWER_STYLES."""
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
