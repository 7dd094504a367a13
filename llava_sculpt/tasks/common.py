"""JSON files of records: official annotation files read whole, question files written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from llava_sculpt.errors import UserError
from llava_sculpt.records import read_checked, read_json

Record = dict[str, Any]
T = TypeVar("T")

MANIFEST = "manifest.json"


class SplitSize(TypedDict):
    """How many records a split holds."""

    n: int


class Manifest(TypedDict):
    """What is relied on in the manifest of a prepared folder.

    `files` are the sha256 of its other files; `metric` is what one's own task is scored by (`names.METRICS`).
    """

    name: str
    splits: dict[str, SplitSize]
    image_folder: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    prompt_style: str
    files: NotRequired[dict[str, str]]
    metric: NotRequired[str]


def read_manifest(folder: Path, name: str) -> Manifest:
    """The manifest of data set `name` in its prepared folder.

    Raises:
        UserError: missing, damaged, or of another data set.
    """
    manifest = read_checked(folder / MANIFEST, Manifest)
    if manifest["name"] != name:
        raise UserError(f"{folder / MANIFEST}: holds {manifest['name']!r}, not {name}")
    return manifest


def describe(folder: Path, manifest: Record) -> str:
    """One line about a prepared folder."""
    counts = ", ".join(f"{split} {facts['n']:,}" for split, facts in manifest["splits"].items())
    return f"{folder}: {counts}; {manifest.get('metric', manifest['prompt_style'])}; {manifest['license']}"


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
