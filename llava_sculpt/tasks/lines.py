"""JSON lines (LLaVA's question and answer files) and JSON lists of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError

_TOLD = 20


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file or of one JSON list, each with its place ("line 3", "entry 2").

    Blank lines are skipped. Raises one UserError: file missing, unreadable or without records, or all lines that
    hold no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: file not found") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    problems: list[str] = []
    found: list[tuple[str, Any]] = []
    if text.lstrip().startswith("["):
        found = [(f"entry {n}", record) for n, record in enumerate(_parse(path, "", text, problems) or (), 1)]
    else:
        # Not splitlines(): JSON leaves U+2028 and its like unescaped inside a record.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                before = len(problems)
                record = _parse(path, f"line {number}: ", line, problems)
                if len(problems) == before:
                    found.append((f"line {number}", record))
    problems += [
        f"{path}: {where}: expected an object, found {type(r).__name__}"
        for where, r in found
        if not isinstance(r, dict)
    ]
    if len(problems) > _TOLD:
        problems[_TOLD:] = [f"{path}: ... and {len(problems) - _TOLD} more problems"]
    if problems or not found:
        raise UserError(problems or f"{path}: holds no records")
    return found


def _parse(path: Path, where: str, text: str, problems: list[str]) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where or f"line {error.lineno}, column {error.colno}: "
        problems.append(f"{path}: {place}not valid JSON ({error.msg})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        problems.append(f"{path}: {where}not valid JSON ({error})")
    return None
