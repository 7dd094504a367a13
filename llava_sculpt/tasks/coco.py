"""COCO captions (a Target task): Karpathy's split file, or the official training captions -> prepared folder.

Expected under `raw`: `dataset_coco.json` (Karpathy) and / or `captions_train2014.json` (official, also
accepted in `annotations/`), images in `train2014/` and `val2014/`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from llava_sculpt.errors import UserError
from llava_sculpt.tasks.common import (
    Prepared,
    Record,
    Split,
    find_file,
    load_json,
    records_of,
    require_file,
    subset,
    train_record,
    write_prepared,
)
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import Question, asked_by, question_lines
from llava_sculpt.tasks.stream import stream_records

# The five prompts of the paper's training data; one is drawn for every sample.
TRAIN_PROMPTS = (
    "Describe the image as simply as possible with a sentence or phrase.",
    "Give a brief summary of what you see.",
    "Provide a short description of the image.",
    "Write a short description for the image.",
    "Briefly describe the content of the image.",
)
DEFAULT_TEST_PROMPT = "Provide a one-sentence caption for the provided image."
_KARPATHY = ["dataset_coco.json", "annotations/dataset_coco.json"]
_OFFICIAL = ["captions_train2014.json", "annotations/captions_train2014.json"]
_OFFICIAL_VAL = ["captions_val2014.json", "annotations/captions_val2014.json"]
_KARPATHY_COUNTS = {"train": 113_287, "val": 5_000, "test": 5_000}
_OFFICIAL_COUNTS = {"train": 82_783, "test": 40_504}


class _Image(NamedTuple):
    image_id: int
    path: str
    captions: list[str]


def prepare(
    raw: Path,
    out: Path,
    *,
    samples: int = 10_000,
    seed: int = 0,
    val_samples: int = 1_000,
    train_captions: str = "karpathy",
    test_prompt: str = DEFAULT_TEST_PROMPT,
    questions: Path | None = None,
    overwrite: bool = False,
) -> Record:
    """Prepare COCO captions; returns the manifest.

    `train_captions` "karpathy": train = Karpathy's train + restval; "official": train =
    captions_train2014.json. In both cases val and test are Karpathy's if his file is there; with the official
    file alone only `train.json` is written. A training sample is an image with one random prompt of
    TRAIN_PROMPTS and one random reference. `questions` is a question file for the test split (`asked_by`); without
    Karpathy's file its references come from captions_val2014.json.
    """
    if train_captions not in ("karpathy", "official"):
        raise UserError(f"train_captions must be karpathy or official, got {train_captions!r}")
    problems = Problems()
    images: dict[str, list[_Image]] = {}
    files: dict[str, Path] = {}
    counts: dict[str, tuple[int, int | None]] = {}

    def take(file: Path, found: dict[str, list[_Image]], official: dict[str, int]) -> None:
        for split, of_split in found.items():
            images[split], files[split] = of_split, file
            counts[split] = (len(of_split), official[split])

    if train_captions == "karpathy" or find_file(raw, _KARPATHY):
        hint = "With captions_train2014.json alone, pass --train_captions official (training split only)."
        file = require_file(raw, _KARPATHY, hint)
        with problems.gather(file):
            take(file, _read_karpathy(file, problems), _KARPATHY_COUNTS)
    elif questions:
        file = require_file(raw, _OFFICIAL_VAL, "A question file needs it, or Karpathy's dataset_coco.json.")
        with problems.gather(file):
            take(file, {"test": _read_official(file, "val2014", problems)}, _OFFICIAL_COUNTS)
    if train_captions == "official":
        file = require_file(raw, _OFFICIAL)
        with problems.gather(file):
            take(file, {"train": _read_official(file, "train2014", problems)}, _OFFICIAL_COUNTS)
    problems.raise_if_any()

    lines: dict[str, list[Record]] = {}
    for split, found in images.items():
        if split != "test":
            count = samples if split == "train" else val_samples
            images[split] = found = subset(found, count, seed=seed, purpose=f"coco/{split}")
        asked = [Question(image.image_id, (image.path, f"images/{image.path}"), None, test_prompt) for image in found]
        if split == "test" and questions:
            with problems.gather(questions):
                asked = asked_by(questions, asked, problems)
        lines[split] = question_lines(raw, asked, files[split], problems)
    problems.raise_with_images()
    captions = {split: {image.image_id: image.captions for image in found} for split, found in images.items()}
    train = [
        (line["question_id"], line["image"], captions["train"][line["question_id"]]) for line in lines.pop("train")
    ]

    prepared = Prepared(
        image_folder=raw,
        prompt_style=f"caption, test as in {questions.name}" if questions else f"caption, test prompt: {test_prompt}",
        license="annotations CC BY 4.0; images under Flickr's terms (https://cocodataset.org/#termsofuse)",
        sources=[*dict.fromkeys(files.values()), *([questions] if questions else [])],
        options={"train_captions": train_captions, "test_prompt": test_prompt, "val_samples": val_samples},
        counts=counts,
        train=_train_records(train, seed),
        splits={split: _split(of_split, captions[split]) for split, of_split in lines.items()},
    )
    return write_prepared(out, "coco", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _train_records(images: list[tuple[int, str, list[str]]], seed: int) -> list[Record]:
    rng = random.Random(f"coco/train-texts/{seed}")
    return [
        train_record(f"coco_{image_id}", path, rng.choice(TRAIN_PROMPTS), rng.choice(captions))
        for image_id, path, captions in images
    ]


def _split(lines: list[Record], captions: dict[int, list[str]]) -> Split:
    annotations: list[Record] = []
    for line in lines:
        for caption in captions[line["question_id"]]:
            annotations.append({"image_id": line["question_id"], "id": len(annotations), "caption": caption})
    gold = {
        "images": [{"id": line["question_id"], "file_name": Path(line["image"]).name} for line in lines],
        "annotations": annotations,
    }
    return Split(lines, gold)


def _read_karpathy(file: Path, problems: Problems) -> dict[str, list[_Image]]:
    """Images by our split names; Karpathy's "restval" (val2014 images used for training) joins train."""
    splits: dict[str, list[_Image]] = {"train": [], "val": [], "test": []}
    seen: set[int] = set()
    for number, record in stream_records(file, "images"):
        where = f"image record {number}"
        image_id = problems.value(record, "cocoid", int, file, where)
        name = problems.value(record, "filename", str, file, where)
        folder = problems.value(record, "filepath", str, file, where)
        split = problems.value(record, "split", str, file, where)
        sentences = problems.value(record, "sentences", list, file, where)
        if image_id is None or name is None or folder is None or split is None or sentences is None:
            continue
        captions = [problems.value(s, "raw", str, file, f"{where}, sentence {i}") for i, s in enumerate(sentences)]
        split = "train" if split == "restval" else split
        if split not in splits:
            problems.add(file, where, f"unknown split {split!r}")
        elif image_id in seen:
            problems.add(file, where, f"cocoid {image_id} occurs twice")
        elif not captions:
            problems.add(file, where, "no sentences")
        else:
            splits[split].append(_Image(image_id, f"{folder}/{name}", [c.strip() for c in captions if c]))
            seen.add(image_id)
    for split, found in splits.items():
        if not found:
            problems.add(file, "", f"no images of split {split!r}")
    return splits


def _read_official(file: Path, year: str, problems: Problems) -> list[_Image]:
    content = load_json(file, dict)
    images: dict[int, _Image] = {}
    for number, record in enumerate(records_of(content, "images", file)):
        image_id = problems.value(record, "id", int, file, f"image {number}")
        name = problems.value(record, "file_name", str, file, f"image {number}")
        if image_id is not None and name is not None:
            images[image_id] = _Image(image_id, f"{year}/{name}", [])
    for number, record in enumerate(records_of(content, "annotations", file)):
        image_id = problems.value(record, "image_id", int, file, f"annotation {number}")
        caption = problems.value(record, "caption", str, file, f"annotation {number}")
        if image_id is None or caption is None:
            continue
        if image_id not in images:
            problems.add(file, f"annotation {number}", f"image_id {image_id} is not among the images")
        else:
            images[image_id].captions.append(caption.strip())
    for image in images.values():
        if not image.captions:
            problems.add(file, f"image {image.image_id}", "no caption")
    return list(images.values())
