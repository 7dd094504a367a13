"""Small raw folders in the official layouts of the six data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Builder = Callable[[str], Path]


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)


def _iconqa(raw: Path) -> None:
    pids: dict[str, list[str]] = {}
    for split, count in (("train", 12), ("val", 4), ("test", 5)):
        pids[f"choose_txt_{split}"] = [f"{len(split)}0{i}" for i in range(count)]
        for i, pid in enumerate(pids[f"choose_txt_{split}"]):
            folder = raw / "iconqa_data/iconqa" / split / "choose_txt" / pid
            put(
                folder / "data.json",
                {"question": f"Which {i}?", "choices": ["cat", "dog", "sun"], "answer": i % 3, "grade": "1"},
            )
            picture(folder / "image.png")
    put(raw / "iconqa_data/pid_splits.json", pids)


def _coco(raw: Path) -> None:
    images, plain, annotations = [], [], []
    for i in range(20):
        split = ("train", "train", "restval", "val", "test")[i % 5]
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{i:012d}.jpg"
        sentences = [{"raw": f"caption {i} {j} ", "sentid": 10 * i + j} for j in range(5)]
        images.append({"filepath": folder, "filename": name, "cocoid": i, "split": split, "sentences": sentences})
        picture(raw / folder / name)
        if split == "train":
            plain.append({"id": i, "file_name": name})
            annotations += [{"id": j, "image_id": i, "caption": f"official {i} {j}"} for j in range(5)]
    put(raw / "dataset_coco.json", {"images": images, "dataset": "coco"})
    put(raw / "annotations/captions_train2014.json", {"images": plain, "annotations": annotations})


def _okvqa(raw: Path) -> None:
    for year, count in (("train2014", 6), ("val2014", 4)):
        questions, gold = [], []
        for i in range(count):
            questions.append({"question_id": 10 * i + 5, "image_id": i, "question": f"What {i}?"})
            answers = [{"answer_id": a, "answer": "dog", "raw_answer": "dog"} for a in range(1, 11)]
            gold.append({"question_id": 10 * i + 5, "image_id": i, "answers": answers})
            picture(raw / year / f"COCO_{year}_{i:012d}.jpg")
        put(raw / f"OpenEnded_mscoco_{year}_questions.json", {"questions": questions})
        put(raw / f"mscoco_{year}_annotations.json", {"annotations": gold})


def _ocrvqa(raw: Path) -> None:
    content = {}
    for i in range(9):
        content[f"b{i}"] = {
            "imageURL": f"http://images.example/I/{i}.{'jpg' if i % 2 else 'png'}?x=1",
            "questions": ["Who wrote this?", "Which year?"],
            "answers": [f"Author {i}", "1999"],
            "split": i % 3 + 1,
        }
        picture(raw / "images" / f"b{i}.{'jpg' if i % 2 else 'png'}")
    put(raw / "dataset.json", content)


def _gqa(raw: Path) -> None:
    for name, count in (("testdev_balanced_questions", 4), ("val_balanced_questions", 6)):
        content = {}
        for i in range(count):
            content[f"q{i}"] = {
                "imageId": f"n{i}",
                "question": f"Is it {i}?",
                "answer": "yes",
                "fullAnswer": "Yes, it is.",
                "isBalanced": True,
                "types": {"structural": "verify", "semantic": "obj", "detailed": "exist"},
                "semantic": [{"operation": "select"}],
            }
            picture(raw / "images" / f"n{i}.jpg")
        put(raw / f"{name}.json", content)


def _textvqa(raw: Path) -> None:
    for part, count in (("train", 5), ("val", 4)):
        data, ocr = [], []
        for i in range(count):
            image_id = f"{part}{i}"
            record = {
                "question": f"what {i}?",
                "image_id": image_id,
                "question_id": i,
                "answers": ["stop"] * 10,
            }
            data.append(record)
            ocr.append({"image_id": image_id, "ocr_tokens": ["STOP", "now"] if i else []})
            picture(raw / "train_images" / f"{image_id}.jpg")
        put(raw / f"TextVQA_0.5.1_{part}.json", {"data": data})
        put(raw / f"TextVQA_Rosetta_OCR_v0.2_{part}.json", {"data": ocr})


WRITERS = {
    "iconqa": _iconqa,
    "coco": _coco,
    "okvqa": _okvqa,
    "ocrvqa": _ocrvqa,
    "gqa": _gqa,
    "textvqa": _textvqa,
}


@pytest.fixture
def make_raw(tmp_path: Path) -> Builder:
    """`make_raw(name)` writes the official files of a data set and returns their folder."""

    def make(name: str) -> Path:
        raw = tmp_path / "raw" / name
        WRITERS[name](raw)
        return raw

    return make
