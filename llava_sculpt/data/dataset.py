"""The training set: a LLaVA JSON file and an image folder, validated as a whole, read sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from llava_sculpt.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_record, record_problems
from llava_sculpt.data.image_check import check_images, images_fingerprint, outside_problem
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.records import read_json

MAX_PROBLEMS_SHOWN = 20


class Validated(NamedTuple):
    """The records of a training file, all sound, and the fingerprint of their images (`images_fingerprint`)."""

    records: list[dict[str, Any]]
    images: str


def read_training_file(data_path: str | Path) -> list[Any]:
    """The list in a LLaVA training file, its items unchecked.

    UserError if the file is missing, is not JSON, does not hold a list, or holds an empty one.
    """
    try:
        records = read_json(Path(data_path))
    except UserError as error:
        hint = "; JSON lines are not read, write one JSON list" if "Extra data" in str(error) else ""
        raise UserError(f"{error}{hint}") from error
    if not isinstance(records, list):
        raise UserError(f"{data_path}: must hold a JSON list of samples, but holds {type(records).__name__}")
    if not records:
        raise UserError(f"{data_path}: holds no samples")
    return records


def validate_dataset(
    data_path: str | Path,
    image_folder: str | Path | None,
    more: Callable[[dict[str, Any]], list[str]] | None = None,
    *,
    allow_outside: bool = False,
) -> Validated:
    """Check every record and every image of a training file.

    Needs neither model nor tokenizer. Each image is read from the disk once. Image names start
    from ``image_folder``, which may be None for a set without images, and may lead out of it only with
    ``allow_outside``. ``more`` returns (or raises as UserError) further problems of a record that has none of its own.
    Raises one UserError with all problems.
    """
    records = read_training_file(data_path)
    problems = _record_problems(records, more)
    images = {i: r["image"] for i, r in enumerate(records) if isinstance(r, dict) and _has_image_name(r)}
    if images and not (image_folder is not None and Path(image_folder).is_dir()):
        where = "no image folder is given" if image_folder is None else f"there is no folder {image_folder}"
        lines = [f"{data_path}: has samples with images, but {where} (image_folder)"]
        raise UserError(lines + _messages(data_path, records, problems))
    paths = {i: Path(str(image_folder)) / name for i, name in images.items()}
    for i, name in images.items():
        if not allow_outside and (outside := outside_problem(str(image_folder), name)):
            problems[i].append(f"{outside} (allow_outside)")
            del paths[i]
    bad, hashes = check_images(paths.values())
    for i, path in paths.items():
        if path in bad:
            problems[i].append(f"{bad[path]}: {path}")
    _raise_if_any(data_path, records, problems)
    return Validated(records, images_fingerprint({images[i]: hashes[path] for i, path in paths.items()}))


class LlavaDataset(Dataset[dict[str, Any]]):
    """Samples of a LLaVA training file.

    An item has ``input_ids`` and ``labels`` (int64 [n], one ``IMAGE_TOKEN_INDEX`` for the image, not truncated)
    and ``pixel_values`` (float32 [3, H, W], None for a sample without an image).

    ``modality_lengths`` holds one non-zero number per sample: its length in tokens, with ``image_tokens`` for
    the image and cut at ``model_max_length``; negative for a sample without an image.
    """

    def __init__(
        self,
        data_path: str | Path,
        image_folder: str | Path | None,
        tokenizer: LlavaTokenizer,
        preprocessor: ImagePreprocessor,
        model_max_length: int,
        image_tokens: int,
    ) -> None:
        """Read the file and encode every text once, for the lengths; images stay closed.

        Raises one UserError with all malformed records, among them those that lose part of their image or all
        of their answers when they are cut at ``model_max_length``.
        """
        self.data_path = Path(data_path)
        self.image_folder = Path(image_folder) if image_folder is not None else Path()
        self.tokenizer = tokenizer
        self.preprocessor = preprocessor
        self.records: list[dict[str, Any]] = read_training_file(data_path)
        self.modality_lengths: list[int] = []

        def measure(record: dict[str, Any]) -> list[str]:
            ids, labels = encode_record(record, tokenizer)
            length = min(expanded_length(ids, image_tokens), model_max_length)
            self.modality_lengths.append(length if "image" in record else -length)
            return length_problems(ids, labels, model_max_length, image_tokens)

        _raise_if_any(data_path, self.records, _record_problems(self.records, measure))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        ids, labels = encode_record(record, self.tokenizer)
        pixels = None
        if "image" in record:
            pixels = self.preprocessor(load_rgb(self.image_folder / record["image"]))
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}


def _has_image_name(record: dict[str, Any]) -> bool:
    return isinstance(record.get("image"), str) and bool(record["image"].strip())


def expanded_length(ids: list[int], image_tokens: int) -> int:
    """Number of tokens with ``image_tokens`` for the image placeholder in ``ids``; not truncated."""
    return len(ids) + (image_tokens - 1) * ids.count(IMAGE_TOKEN_INDEX)


def length_problems(ids: list[int], labels: list[int], max_length: int, image_tokens: int) -> list[str]:
    """Whether a cut at ``max_length`` tokens would lose part of a sample's image or all of its answers."""
    behind_image = ids.index(IMAGE_TOKEN_INDEX) + 1 if IMAGE_TOKEN_INDEX in ids else 0
    image_end = expanded_length(ids[:behind_image], image_tokens)
    if image_end > max_length:
        return [f"the image ends at token {image_end}, beyond model_max_length {max_length}: raise it"]
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    place = expanded_length(ids[:first], image_tokens)
    if place >= max_length:
        return [f"the first answer is at token {place + 1}, beyond model_max_length {max_length}: raise it"]
    return []


def _record_problems(records: list[Any], more: Callable[[dict[str, Any]], list[str]] | None) -> dict[int, list[str]]:
    """The problems of each record by its position."""
    problems = {i: record_problems(record) for i, record in enumerate(records)}
    for i, record in enumerate(records):
        if more and not problems[i]:
            try:
                problems[i] = more(record)
            except UserError as error:
                problems[i] = error.problems
    return problems


def _messages(data_path: str | Path, records: list[Any], problems: dict[int, list[str]]) -> list[str]:
    """One line per problem, with file and record; after ``MAX_PROBLEMS_SHOWN`` only how many more there are."""
    lines = []
    for i, found in problems.items():
        name = f" (id {records[i]['id']!r})" if isinstance(records[i], dict) and "id" in records[i] else ""
        lines += [f"{data_path}: record {i + 1} of {len(records)}{name}: {problem}" for problem in found]
    more = len(lines) - MAX_PROBLEMS_SHOWN
    if more > 0:
        lines[MAX_PROBLEMS_SHOWN:] = [f"{data_path}: and {more} more problem{'s' if more > 1 else ''}"]
    return lines


def _raise_if_any(data_path: str | Path, records: list[Any], problems: dict[int, list[str]]) -> None:
    lines = _messages(data_path, records, problems)
    if lines:
        raise UserError(lines)
