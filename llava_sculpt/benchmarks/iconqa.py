"""IconQA, sub-task choose_txt (a Target task): official `iconqa_data.zip` -> prepared folder.

Expected under `raw` (the unpacked zip, with or without its top folder `iconqa_data/`):
`pid_splits.json` and `iconqa/{train,val,test}/choose_txt/<pid>/{data.json,image.png}`.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase

from llava_sculpt.benchmarks.common import (
    Prepared,
    Problems,
    Record,
    Split,
    load_json,
    question_line,
    require_file,
    subset,
    train_record,
    write_prepared,
)
from llava_sculpt.errors import UserError

INSTRUCTIONS = {
    "letter": "Answer with the option's letter from the given choices directly.",
    "text": "Answer with the text of the correct choice.",
}


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    answer_style: str = "letter",
    overwrite: bool = False,
) -> Record:
    """Prepare IconQA choose_txt; returns the manifest.

    The prompt is the question, one line `A. text` per choice, and an instruction. `answer_style` "letter"
    asks for (and trains) the letter, "text" the text of the choice; training target and gold always agree,
    because the score is an exact match. Raises UserError listing every malformed record.
    """
    if answer_style not in INSTRUCTIONS:
        raise UserError(f"answer_style must be one of {', '.join(INSTRUCTIONS)}, got {answer_style!r}")
    splits_file = require_file(raw, ["pid_splits.json", "iconqa_data/pid_splits.json"])
    root = splits_file.parent
    pids = load_json(splits_file, dict)
    problems = Problems()
    chosen: dict[str, list[str]] = {}
    for split, count in (("train", samples), ("val", val_samples), ("test", None)):
        key = f"choose_txt_{split}"
        listed = problems.value(pids, key, list, splits_file, "")
        if listed is not None:
            names = [str(pid) for pid in listed]
            if len(set(names)) < len(names):
                problems.add(splits_file, key, "lists a problem id twice")
            chosen[split] = names if count is None else subset(names, count, seed=seed, purpose=f"iconqa/{split}")
    problems.raise_if_any()

    rows = {
        split: [_read(root, split, pid, answer_style, problems) for pid in names] for split, names in chosen.items()
    }
    problems.raise_if_any()
    good = {split: [row for row in found if row is not None] for split, found in rows.items()}
    train = [train_record(f"iconqa_{pid}", image, text, answer) for pid, image, text, answer in good.pop("train")]
    splits = {
        split: Split(
            [question_line(pid, image, text) for pid, image, text, _ in found],
            [{"question_id": pid, "answer": answer} for pid, _, _, answer in found],
        )
        for split, found in good.items()
    }
    prepared = Prepared(
        image_folder=root,
        prompt_style=f"choices, answer by {answer_style}",
        license="CC BY-NC-SA 4.0",
        sources=[splits_file],
        options={"answer_style": answer_style, "val_samples": val_samples},
        train=train,
        splits=splits,
    )
    return write_prepared(out, "iconqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _read(root: Path, split: str, pid: str, style: str, problems: Problems) -> tuple[str, str, str, str] | None:
    """(pid, image path, prompt, answer) of one problem folder."""
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
    image = problems.image(root, [f"{folder}/{pid}/image.png"], file, where)
    if question is None or choices is None or answer is None or image is None:
        return None
    if len(choices) > len(ascii_uppercase):
        problems.add(file, where, f"{len(choices)} choices, but there are only 26 letters")
        return None
    if not 0 <= answer < len(choices):
        problems.add(file, where, f"answer {answer} is no index into the {len(choices)} choices")
        return None
    options = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    prompt = "\n".join([question, *options, INSTRUCTIONS[style]])
    return pid, image, prompt, ascii_uppercase[answer] if style == "letter" else choices[answer]
