"""The Target tasks as raw files: IconQA's choose_txt layout and Karpathy's COCO split file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sculpt.tiny.draw import World
from llava_sculpt.tiny.raw_files import put
from llava_sculpt.tiny.scenes import SIZE, encoded


def write_iconqa(world: World, folder: Path) -> None:
    """`iconqa_data/{problems,pid_splits}.json` and `iconqa_data/iconqa/<split>/choose_txt/<pid>/`."""
    root = folder / "iconqa_data"
    problems: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[str]] = {}
    for split, samples in world.iconqa.items():
        listed = splits.setdefault(f"choose_txt_{split}", [])
        for scene, choice in samples:
            pid = str(len(problems) + 1)
            listed.append(pid)
            problem = {
                "question": choice.question,
                "choices": list(choice.choices),
                "answer": choice.answer,
                "ques_type": "choose_txt",
                "grade": "kindergarten",
                "label": choice.family,
            }
            problems[pid] = {**problem, "split": split}
            place = root / "iconqa" / split / "choose_txt" / pid
            put(place / "data.json", problem)
            put(place / "image.png", encoded(scene, "PNG"))
    put(root / "problems.json", problems)
    put(root / "pid_splits.json", splits)


def write_coco(world: World, folder: Path) -> None:
    """`dataset_coco.json`, `annotations/captions_{train,val}2014.json`, pictures in `{train,val}2014/`."""
    images: list[dict[str, Any]] = []
    official: dict[str, dict[str, list[dict[str, Any]]]] = {}
    sentence_id = 0
    for split, samples in world.coco.items():
        year = "train2014" if split == "train" else "val2014"
        for scene, references in samples:
            image_id = len(images) + 1
            name = f"COCO_{year}_{image_id:012d}.jpg"
            captions = official.setdefault(year, {"images": [], "annotations": []})
            captions["images"].append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
            sentences = []
            for text in references:
                captions["annotations"].append({"id": sentence_id, "image_id": image_id, "caption": text})
                words = [word for word in text.split() if word.isalnum()]
                sentences.append({"raw": text, "tokens": words, "imgid": image_id - 1, "sentid": sentence_id})
                sentence_id += 1
            images.append(
                {
                    "filepath": year,
                    "filename": name,
                    "cocoid": image_id,
                    "imgid": image_id - 1,
                    "split": split,
                    "sentids": [sentence["sentid"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
            put(folder / year / name, encoded(scene))
    put(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for year, content in official.items():
        put(folder / "annotations" / f"captions_{year}.json", {"info": {}, "licenses": [], **content})
