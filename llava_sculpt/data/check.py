"""`llava-sculpt check-data`: validation of a training file, its lengths, and the tokens that are trained on."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llava_sculpt.data.conversation import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, encode_record
from llava_sculpt.data.dataset import expanded_length, length_problems, validate_dataset
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError

_PERCENTILES = (0, 50, 90, 99, 100)
_LONGEST = 5
_TRAINED_FROM, _TRAINED_TO = "⟦", "⟧"


def check_data(
    data_path: Path,
    image_folder: Path | None,
    tokenizer: LlavaTokenizer,
    image_tokens: int,
    model_max_length: int = 2048,
    samples: int = 3,
    *,
    allow_outside: bool = False,
) -> dict[str, Any]:
    """Validate every record and image of a training file; returns its lengths and some encoded records.

    Lengths are in tokens with `image_tokens` for the image, before the cut at `model_max_length`; a percentile is the
    shortest length that at least so many percent of the records do not exceed. "samples" are
    `samples` records evenly spaced over the file, each with "input_ids" (IMAGE_TOKEN_INDEX for the image, not cut),
    "labels" and "text", in which ⟦ and ⟧ enclose what the loss is computed on. Raises one UserError with all
    problems, as training would.
    """
    if samples < 0 or model_max_length < 1:
        raise UserError(f"samples and model_max_length must not be negative, got {samples} and {model_max_length}")
    lengths: list[int] = []
    trained = 0

    def measure(record: dict[str, Any]) -> list[str]:
        nonlocal trained
        ids, labels = encode_record(record, tokenizer)
        lengths.append(expanded_length(ids, image_tokens))
        trained += sum(label != IGNORE_INDEX for label in labels)
        return length_problems(ids, labels, model_max_length, image_tokens)

    records = validate_dataset(data_path, image_folder, measure, allow_outside=allow_outside).records
    ordered = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shown = min(samples, len(records))
    return {
        "data": str(data_path),
        "records": len(records),
        "with_image": sum("image" in record for record in records),
        "images": len({record["image"] for record in records if "image" in record}),
        "answers": sum(turn["from"] == "gpt" for record in records for turn in record["conversations"]),
        "tokens": sum(lengths),
        "trained_on_tokens": trained,
        "length_percentiles": {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in _PERCENTILES},
        "model_max_length": model_max_length,
        "truncated": {
            "records": sum(length > model_max_length for length in lengths),
            "tokens_lost": sum(max(0, length - model_max_length) for length in lengths),
        },
        "longest": [{"record": i + 1, "id": records[i].get("id"), "length": lengths[i]} for i in ordered[:_LONGEST]],
        "samples": [
            _sample(i, records[i], lengths[i], tokenizer) for i in (len(records) * k // shown for k in range(shown))
        ],
    }


def format_check(found: dict[str, Any]) -> str:
    """The result of `check_data` as text."""
    percentiles = ", ".join(
        f"{ {'0': 'shortest', '50': 'median', '100': 'longest'}.get(p, p + ' %') } {length:,}"
        for p, length in found["length_percentiles"].items()
    )
    cut = found["truncated"]
    longest = ", ".join(f"{r['length']:,} (record {r['record']}, id {r['id']!r})" for r in found["longest"])
    lines = [
        f"{found['data']}: {found['records']:,} records are sound, {found['with_image']:,} with an image "
        f"({found['images']:,} files, all readable), {found['answers']:,} answers",
        f"tokens: {found['tokens']:,} with the images, {found['trained_on_tokens']:,} trained on",
        f"length of a record: {percentiles}",
        f"longest: {longest}",
        f"cut at model_max_length {found['model_max_length']:,}: {cut['records']:,} records, "
        f"{cut['tokens_lost']:,} tokens lost",
    ]
    for sample in found["samples"]:
        head = f"record {sample['record']} (id {sample['id']!r}, {sample['length']:,} tokens)"
        lines += ["", f"{head}, trained on the part in {_TRAINED_FROM} {_TRAINED_TO}:", sample["text"]]
    return "\n".join(lines)


def _sample(position: int, record: dict[str, Any], length: int, tokenizer: LlavaTokenizer) -> dict[str, Any]:
    ids, labels = encode_record(record, tokenizer)
    return {
        "record": position + 1,
        "id": record.get("id"),
        "image": record.get("image"),
        "length": length,
        "text": marked_text(ids, labels, tokenizer),
        "input_ids": ids,
        "labels": labels,
    }


def marked_text(ids: list[int], labels: list[int], tokenizer: LlavaTokenizer) -> str:
    """The text of `ids` with ⟦ and ⟧ around what `labels` trains on and `<image>` for the image."""
    text = ""
    place = 0
    for is_image, group in groupby(ids, key=lambda i: i == IMAGE_TOKEN_INDEX):
        chunk = list(group)
        if is_image:
            text += IMAGE_PLACEHOLDER * len(chunk)
        else:
            text += _marked_chunk(chunk, labels[place : place + len(chunk)], tokenizer)
        place += len(chunk)
    return text


def _marked_chunk(ids: list[int], labels: list[int], tokenizer: LlavaTokenizer) -> str:
    text = ""
    done = 0
    end = 0
    for is_trained, run in groupby(labels, key=lambda label: label != IGNORE_INDEX):
        end += len(list(run))
        # Decoded from the beginning, because a space belongs to the token after it.
        decoded = tokenizer.decode(ids[:end], skip_special=False)
        piece = decoded[done:]
        done = len(decoded)
        space = piece[: len(piece) - len(piece.lstrip(" "))] if is_trained else ""
        text += f"{space}{_TRAINED_FROM}{piece[len(space) :]}{_TRAINED_TO}" if is_trained else piece
    return text
