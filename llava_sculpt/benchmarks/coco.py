"""COCO captions (a Target task): Karpathy's split file, or the official training captions -> prepared folder.

Expected under `raw`: `dataset_coco.json` (Karpathy) and / or `captions_train2014.json` (official, also
accepted in `annotations/`), images in `train2014/` and `val2014/`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from llava_sculpt.benchmarks.common import (
    Prepared,
    Problems,
    Record,
    Split,
    find_file,
    load_json,
    question_line,
    records_of,
    require_file,
    subset,
    train_record,
    write_prepared,
)
from llava_sculpt.errors import UserError

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
    overwrite: bool = False,
) -> Record:
    """Prepare COCO captions; returns the manifest.

    `train_captions` "karpathy": train = Karpathy's train + restval; "official": train =
    captions_train2014.json. In both cases val and test are Karpathy's if his file is there; with the official
    file alone only `train.json` is written. A training sample is an image with one random prompt of
    TRAIN_PROMPTS and one random reference.
    """
    if train_captions not in ("karpathy", "official"):
        raise UserError(f"train_captions must be karpathy or official, got {train_captions!r}")
    problems = Problems()
    sources: list[Path] = []
    images: dict[str, list[_Image]] = {}
    if train_captions == "karpathy" or find_file(raw, _KARPATHY):
        hint = "With captions_train2014.json alone, pass --train_captions official (training split only)."
        file = require_file(raw, _KARPATHY, hint)
        sources.append(file)
        images = _read_karpathy(file, problems)
    if train_captions == "official":
        file = require_file(raw, _OFFICIAL)
        sources.append(file)
        images["train"] = _read_official(file, problems)
    problems.raise_if_any()

    for split, count in (("train", samples), ("val", val_samples)):
        if split in images:
            images[split] = subset(images[split], count, seed=seed, purpose=f"coco/{split}")
    for split, found in images.items():
        images[split] = [_located(raw, image, sources[-1 if split == "train" else 0], problems) for image in found]
    problems.raise_if_any()

    prepared = Prepared(
        image_folder=raw,
        prompt_style=f"caption, test prompt: {test_prompt}",
        license="annotations CC BY 4.0; images under Flickr's terms (https://cocodataset.org/#termsofuse)",
        sources=sources,
        options={"train_captions": train_captions, "test_prompt": test_prompt, "val_samples": val_samples},
        train=_train_records(images.get("train", []), seed),
        splits={split: _split(images[split], test_prompt) for split in ("val", "test") if split in images},
    )
    return write_prepared(out, "coco", prepared, seed=seed, samples=samples, overwrite=overwrite)


def _train_records(images: list[_Image], seed: int) -> list[Record]:
    rng = random.Random(f"coco/train-texts/{seed}")
    return [
        train_record(f"coco_{image.image_id}", image.path, rng.choice(TRAIN_PROMPTS), rng.choice(image.captions))
        for image in images
    ]


def _split(images: list[_Image], prompt: str) -> Split:
    annotations: list[Record] = []
    for image in images:
        for caption in image.captions:
            annotations.append({"image_id": image.image_id, "id": len(annotations), "caption": caption})
    gold = {
        "images": [{"id": image.image_id, "file_name": Path(image.path).name} for image in images],
        "annotations": annotations,
    }
    return Split([question_line(image.image_id, image.path, prompt) for image in images], gold)


def _read_karpathy(file: Path, problems: Problems) -> dict[str, list[_Image]]:
    """Images by our split names; Karpathy's "restval" (val2014 images used for training) joins train."""
    splits: dict[str, list[_Image]] = {"train": [], "val": [], "test": []}
    seen: set[int] = set()
    for number, record in enumerate(records_of(load_json(file, dict), "images", file)):
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


def _read_official(file: Path, problems: Problems) -> list[_Image]:
    content = load_json(file, dict)
    images: dict[int, _Image] = {}
    for number, record in enumerate(records_of(content, "images", file)):
        image_id = problems.value(record, "id", int, file, f"image {number}")
        name = problems.value(record, "file_name", str, file, f"image {number}")
        if image_id is not None and name is not None:
            images[image_id] = _Image(image_id, f"train2014/{name}", [])
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


def _located(raw: Path, image: _Image, file: Path, problems: Problems) -> _Image:
    """The image with the path at which it was found (the folders may also lie in `images/`)."""
    path = problems.image(raw, [image.path, f"images/{image.path}"], file, f"image {image.image_id}")
    return image._replace(path=path or image.path)
