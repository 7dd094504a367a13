"""GQA (a Source task): official balanced question files -> prepared folder.

Expected under `raw` (or in its folder `questions/`): `testdev_balanced_questions.json` -> `test`; if
`val_balanced_questions.json` is there too, a sample of it -> `val`. Images: `images/<imageId>.jpg`.
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
    require_file,
    subset,
    write_prepared,
)

# What the scorer and a reader of per-question scores need; the scene-graph programs would be most of the
# file.
_KEPT = ("imageId", "question", "answer", "fullAnswer", "isBalanced", "types")


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    overwrite: bool = False,
) -> Record:
    """Prepare GQA for evaluation; returns the manifest. UserError lists every malformed record."""
    problems = Problems()
    splits: dict[str, Split] = {}
    sources: list[Path] = []
    for split, name in (("val", "val_balanced_questions.json"), ("test", "testdev_balanced_questions.json")):
        places = [name, f"questions/{name}"]
        if split == "val" and find_file(raw, places) is None:
            continue
        file = require_file(raw, places)
        sources.append(file)
        splits[split] = _read(raw, file, val_samples if split == "val" else None, seed, problems)
    problems.raise_if_any()
    prepared = Prepared(
        image_folder=raw,
        prompt_style="short answer",
        license="CC BY 4.0",
        sources=sources,
        options={"val_samples": val_samples},
        splits=splits,
    )
    return write_prepared(out, "gqa", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _read(raw: Path, file: Path, limit: int | None, seed: int, problems: Problems) -> Split:
    rows: list[tuple[str, str, str]] = []
    content = load_json(file, dict)
    for question_id, record in content.items():
        where = f"question {question_id}"
        text = problems.question(record, "question", file, where)
        image_id = problems.value(record, "imageId", str, file, where)
        answer = problems.value(record, "answer", str, file, where)
        balanced = problems.value(record, "isBalanced", bool, file, where)
        types = problems.value(record, "types", dict, file, where)
        structural = problems.value(types, "structural", str, file, where) if types is not None else None
        if None not in (answer, balanced, structural) and text is not None and image_id is not None:
            rows.append((question_id, image_id, text))
    if limit is not None and rows:
        rows = subset(rows, limit, seed=seed, purpose="gqa/val")
    lines: list[Record] = []
    for question_id, image_id, text in rows:
        name = f"images/{image_id}.jpg"
        image = problems.image(raw, [name], file, f"question {question_id}")
        lines.append(question_line(question_id, image or name, text + SHORT_ANSWER))
    gold = {qid: {key: content[qid][key] for key in _KEPT if key in content[qid]} for qid, _, _ in rows}
    return Split(lines, gold)
