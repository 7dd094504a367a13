"""Shared by every data set: reading raw JSON, collecting problems, writing the prepared folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llava_sculpt.errors import UserError
from llava_sculpt.records import file_sha256, write_atomically

Record = dict[str, Any]
T = TypeVar("T")

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
MANIFEST = "manifest.json"
_ALL_FILES = {"train.json"} | {f"{s}{end}" for s in ("val", "test") for end in (".jsonl", "_annotations.json")}


@dataclass
class Split:
    """One evaluation split: question lines and the gold answers in the benchmark's official format."""

    questions: list[Record]
    annotations: Any


@dataclass
class Prepared:
    """All that `write_prepared` puts on disk. `train` is None for data sets that are only evaluated.

    `counts` has what the official files hold of each split before sampling, and what the official release holds
    (None where that is not known for certain).
    """

    image_folder: Path
    prompt_style: str
    license: str
    sources: list[Path]
    options: dict[str, Any]
    counts: dict[str, tuple[int, int | None]]
    train: list[Record] | None = None
    splits: dict[str, Split] = field(default_factory=dict)


def find_file(raw: Path, candidates: Sequence[str]) -> Path | None:
    """The first of `candidates` (relative to `raw`) that exists."""
    return next((raw / c for c in candidates if (raw / c).is_file()), None)


def require_file(raw: Path, candidates: Sequence[str], hint: str = "") -> Path:
    """`find_file`, or a UserError that names the places looked at."""
    path = find_file(raw, candidates)
    if path is None:
        places = " or ".join(str(raw / c) for c in candidates)
        raise UserError(f"{places}: file not found" + (f". {hint}" if hint else ""))
    return path


def load_json(path: Path, kind: type[T]) -> T:
    """The JSON of `path`, which must be a `kind` (dict or list) and not empty."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not valid JSON ({place}: {error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise UserError(f"{path}: not valid JSON ({error})") from error
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


def subset(records: Sequence[T], count: int, *, seed: int, purpose: str) -> list[T]:
    """`count` random records in their original order, or all if there are not more.

    Every purpose ("iconqa/train") has its own random stream, so that one option never changes another's
    sample.
    """
    if count < 1:
        raise UserError(f"number of samples must be at least 1, got {count}")
    if len(records) <= count:
        return list(records)
    chosen = random.Random(f"{purpose}/{seed}").sample(range(len(records)), count)
    return [records[i] for i in sorted(chosen)]


def train_record(record_id: str, image: str, question: str, answer: str) -> Record:
    """One sample of LLaVA's training JSON."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "image": image, "conversations": turns}


def write_prepared(out: Path, name: str, prepared: Prepared, *, seed: int, samples: int, overwrite: bool) -> Record:
    """Write the prepared folder and return its manifest.

    Every file is written aside and renamed, the manifest last: a folder with a manifest is complete. The same
    request on the same sources leaves a complete folder untouched; a folder made from another request or
    other sources is refused (UserError) unless `overwrite`.
    """
    try:
        files = _file_contents(prepared)
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: a text of the raw files holds half of a surrogate pair: {error.object!r}") from error
    # The image folder is the one thing that is taken from the raw download in place.
    image_folder = os.path.relpath(prepared.image_folder.resolve(), out.resolve())
    counts = {split: {"n": len(content.questions)} for split, content in prepared.splits.items()}
    if prepared.train is not None:
        counts["train"] = {"n": len(prepared.train)}
    manifest: Record = {
        "name": name,
        "splits": counts,
        "image_folder": image_folder,
        "source_counts": {
            split: {"found": found, "official": official} for split, (found, official) in prepared.counts.items()
        },
        "seed": seed,
        "samples": samples if prepared.train is not None else None,
        "options": prepared.options,
        "prompt_style": prepared.prompt_style,
        "license": prepared.license,
        "source_files": {path.name: file_sha256(path) for path in prepared.sources},
        "files": {file: _sha256(content) for file, content in files.items()},
    }
    manifest_path = out / MANIFEST
    if manifest_path.exists() and not overwrite:
        old = load_json(manifest_path, dict)
        changed = sorted(key for key in old.keys() | manifest.keys() if old.get(key) != manifest.get(key))
        if changed:
            raise UserError(
                f"{out}: holds data prepared differently (differs in: {', '.join(changed)}). "
                "Choose another --out, or pass --overwrite to replace it."
            )
        hashes = manifest["files"].items()
        if all((out / file).is_file() and file_sha256(out / file) == hashed for file, hashed in hashes):
            return manifest
    try:
        out.mkdir(parents=True, exist_ok=True)
        manifest_path.unlink(missing_ok=True)
        for stale in _ALL_FILES - files.keys():
            (out / stale).unlink(missing_ok=True)
        for file, content in files.items():
            write_atomically(out / file, content)
        write_atomically(manifest_path, _json_bytes(manifest))
    except OSError as error:
        raise UserError(f"{out}: cannot write the prepared data: {error}") from error
    return manifest


def json_lines(records: Iterable[Record]) -> bytes:
    """JSON lines, UTF-8, one record a line."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def _file_contents(prepared: Prepared) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    if prepared.train is not None:
        files["train.json"] = _json_bytes(prepared.train)
    for split, content in prepared.splits.items():
        files[f"{split}.jsonl"] = json_lines(content.questions)
        files[f"{split}_annotations.json"] = _json_bytes(content.annotations)
    return files


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
