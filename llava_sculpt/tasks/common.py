"""JSON files of records: official annotation files read whole, question files written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from llava_sculpt.errors import UserError
from llava_sculpt.records import read_json

Record = dict[str, Any]
T = TypeVar("T")

MANIFEST = "manifest.json"


def load_json(path: Path, kind: type[T]) -> T:
    """The JSON of `path`, which must be a `kind` (dict or list) and not empty."""
    content = read_json(path)
    if not isinstance(content, kind):
        raise UserError(f"{path}: should hold a JSON {kind.__name__}, found {type(content).__name__}")
    if not content:
        raise UserError(f"{path}: holds no records")
    return content


def records_of(content: Record, key: str, path: Path) -> list[Any]:
    """The non-empty list `content[key]` of an official file, or a UserError."""
    records = content.get(key)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: no list of records under the key {key!r}")
    return records


def json_lines(records: Iterable[Record]) -> bytes:
    """JSON lines, UTF-8, one record a line."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
