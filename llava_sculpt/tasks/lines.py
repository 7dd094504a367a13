"""JSON lines (LLaVA's question and answer files) and JSON lists of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.records import parse_json, read_text
from llava_sculpt.tasks.problems import Problems


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file or of one JSON list, each with its place ("line 3", "entry 2").

    Blank lines are skipped. Raises one UserError: file missing, unreadable or without records, or all lines that
    hold no JSON object.
    """
    text = read_text(path)
    problems = Problems()
    found: list[tuple[str, Any]] = []
    if text.lstrip().startswith("["):
        found = [(f"entry {n}", record) for n, record in enumerate(parse_json(text, path), 1)]
    else:
        # Not splitlines(): JSON leaves U+2028 and its like unescaped inside a record.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                with problems.gather(path):
                    found.append((f"line {number}", parse_json(line, path, number)))
    for where, record in found:
        if not isinstance(record, dict):
            problems.add(path, where, f"expected an object, found {type(record).__name__}")
    problems.raise_if_any()
    if not found:
        raise UserError(f"{path}: holds no records")
    return found
