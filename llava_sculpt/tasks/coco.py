"""COCO captions (a Target task): Karpathy's split file, or the official training captions -> prepared folder.

Raw files: `dataset_coco.json` (Karpathy) and / or `captions_train2014.json` (official), also in `annotations/`; images
in `train2014/` and `val2014/`, also in `images/`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from llava_sculpt.tasks.common import Record, load_json, records_of
from llava_sculpt.tasks.preparation import Preparation
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import Question
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
_KARPATHY_COUNTS = {"train": 113_287, "val": 5_000, "test": 5_000}
_OFFICIAL_COUNTS = {"train": 82_783, "test": 40_504}


class _Image(NamedTuple):
    image_id: int
    path: str
    captions: list[str]

    def question(self, prompt: str, answer: str = "") -> Question:
        return Question(self.image_id, (self.path, f"images/{self.path}"), None, prompt, answer)


def prepare(
    job: Preparation,
    *,
    train_captions: Annotated[Literal["karpathy", "official"], "whose training split and captions"] = "karpathy",
    test_prompt: Annotated[str, "asked about every validation and test image"] = DEFAULT_TEST_PROMPT,
) -> Record:
    """Prepare COCO captions; returns the manifest.

    Training images are Karpathy's train and restval, or those of captions_train2014.json ("official"), each with one
    random prompt of TRAIN_PROMPTS and one random reference. Validation and test are Karpathy's; with the official file
    alone only `train.json` is written, and the references of a question file come from captions_val2014.json.
    """
    found: dict[str, tuple[list[_Image], Path, int]] = {}  # by split, with their file and official number
    if train_captions == "karpathy" or job.find(*_places("dataset_coco.json")):
        hint = "With captions_train2014.json alone, pass --train_captions official (training split only)."
        file = job.require(*_places("dataset_coco.json"), hint=hint)
        with job.problems.gather(file):
            splits = _read_karpathy(file, job.problems)
            found = {split: (images, file, _KARPATHY_COUNTS[split]) for split, images in splits.items()}
    elif job.questions:
        hint = "A question file needs it, or Karpathy's dataset_coco.json."
        found |= _official("test", "val2014", hint, job)
    if train_captions == "official":
        found |= _official("train", "train2014", "", job)
    job.problems.raise_if_any()

    rng = random.Random(f"coco/train-texts/{job.seed}")
    for split, (images, file, official) in found.items():
        drawn = job.draw(split, images, official)
        if split == "train":
            texts = [image.question(rng.choice(TRAIN_PROMPTS), rng.choice(image.captions)) for image in drawn]
        else:
            texts = [image.question(test_prompt) for image in drawn]
        asked = job.ask(split, texts, file)
        if split != "train":
            job.gold[split] = _gold(asked, {image.image_id: image.captions for image in drawn})
    return job.write(
        "caption" if job.questions else f"caption, test prompt: {test_prompt}",
        "annotations CC BY 4.0; images under Flickr's terms (https://cocodataset.org/#termsofuse)",
    )


def _places(name: str) -> tuple[str, str]:
    return name, f"annotations/{name}"


def _official(split: str, year: str, hint: str, job: Preparation) -> dict[str, tuple[list[_Image], Path, int]]:
    file = job.require(*_places(f"captions_{year}.json"), hint=hint)
    with job.problems.gather(file):
        return {split: (_read_official(file, year, job.problems), file, _OFFICIAL_COUNTS[split])}
    return {}


def _gold(asked: list[Question], captions: dict[Any, list[str]]) -> Record:
    """The references in COCO's caption format."""
    pairs = [(question.question_id, caption) for question in asked for caption in captions[question.question_id]]
    return {
        "images": [{"id": question.question_id, "file_name": Path(question.images[0]).name} for question in asked],
        "annotations": [{"image_id": image, "id": n, "caption": caption} for n, (image, caption) in enumerate(pairs)],
    }


def _read_karpathy(file: Path, problems: Problems) -> dict[str, list[_Image]]:
    """Images by our split names; Karpathy's "restval" (val2014 images used for training) joins train."""
    splits: dict[str, list[_Image]] = {"train": [], "val": [], "test": []}
    seen: set[int] = set()
    for number, record in stream_records(file, "images"):
        where = f"image record {number}"
        row = problems.fields(record, file, where, cocoid=int, filename=str, filepath=str, split=str, sentences=list)
        if row is None:
            continue
        image_id, name, folder, split, sentences = row
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
        row = problems.fields(record, file, f"image {number}", id=int, file_name=str)
        if row is not None:
            images[row[0]] = _Image(row[0], f"{year}/{row[1]}", [])
    for number, record in enumerate(records_of(content, "annotations", file)):
        row = problems.fields(record, file, f"annotation {number}", image_id=int, caption=str)
        if row is None:
            continue
        if row[0] not in images:
            problems.add(file, f"annotation {number}", f"image_id {row[0]} is not among the images")
        else:
            images[row[0]].captions.append(row[1].strip())
    for image in images.values():
        if not image.captions:
            problems.add(file, f"image {image.image_id}", "no caption")
    return list(images.values())
