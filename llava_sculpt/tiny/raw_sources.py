"""The Source tasks as raw files: OK-VQA, OCR-VQA, GQA and TextVQA in their official formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from llava_sculpt.tiny.draw import World
from llava_sculpt.tiny.facts import FACTS
from llava_sculpt.tiny.raw_files import put
from llava_sculpt.tiny.scenes import SIZE, encoded
from llava_sculpt.tiny.sources import QA

ANNOTATORS = 10
_LEAST_AGREEING = 6  # with 4 or more annotators of one opinion its VQA accuracy is 1

# Our val split is written to the official training files of OK-VQA and TextVQA, our test split to their val files.


def _one(rng: Random, questions: list[QA]) -> QA:
    """A question of a random family, so that every family is as frequent as pictures allow."""
    family = rng.choice(sorted({question.family for question in questions}))
    return rng.choice([question for question in questions if question.family == family])


def _opinions(rng: Random, gold: str, others: list[str]) -> list[str]:
    """Ten annotators' answers; 6 to 10 of them are `gold`, the others one of `others` each."""
    agreeing = rng.randint(_LEAST_AGREEING, ANNOTATORS)
    answers = [gold] * agreeing + [rng.choice(others) for _ in range(ANNOTATORS - agreeing)]
    rng.shuffle(answers)
    return answers


def write_okvqa(world: World, folder: Path, seed: int) -> None:
    """Questions and annotations of `train2014` (our val) and `val2014` (our test), with their pictures."""
    rng = Random(f"{seed}/okvqa/annotators")
    image_id = 0
    for split, year in (("val", "train2014"), ("test", "val2014")):
        asked: list[dict[str, Any]] = []
        annotated: list[dict[str, Any]] = []
        for scene, questions in world.sources["okvqa"][split]:
            image_id += 1
            question = _one(rng, questions)
            values = {known[question.family] for known in FACTS.values() if question.family in known}
            opinions = _opinions(rng, question.answer, sorted(values - {question.answer}))
            key = {"image_id": image_id, "question_id": image_id * 10 + 5}
            asked.append({**key, "question": question.text})
            answers = [
                {"answer_id": i, "raw_answer": text, "answer_confidence": "yes", "answer": text}
                for i, text in enumerate(opinions, 1)
            ]
            annotated.append({**key, "question_type": question.family, "answer_type": "other", "answers": answers})
            put(folder / year / f"COCO_{year}_{image_id:012d}.jpg", encoded(scene))
        head = {"data_type": "mscoco", "data_subtype": year, "license": {}, "info": {}}
        put(
            folder / f"OpenEnded_mscoco_{year}_questions.json",
            {**head, "task_type": "Open-Ended", "questions": asked},
        )
        put(folder / f"mscoco_{year}_annotations.json", {**head, "annotations": annotated})


def write_ocrvqa(world: World, folder: Path, seed: int) -> None:
    """`dataset.json` (split 2 = our val, 3 = our test) and `images/`; two questions about each book."""
    rng = Random(f"{seed}/ocrvqa/questions")
    books: dict[str, dict[str, Any]] = {}
    for split, number in (("val", 2), ("test", 3)):
        for scene, questions in world.sources["ocrvqa"][split]:
            book = f"{len(books) + 1:010d}"
            known = {question.family: question.answer for question in questions}
            chosen = rng.sample(questions, 2)
            books[book] = {
                "imageURL": f"https://covers.invalid/{book}.jpg",
                "questions": [question.text for question in chosen],
                "answers": [question.answer for question in chosen],
                "title": known["title"],
                "authorName": known["author"],
                "genre": known["genre"],
                "split": number,
            }
            put(folder / "images" / f"{book}.jpg", encoded(scene))
    put(folder / "dataset.json", books)


_STRUCTURE = {"side": "choose"}


def write_gqa(world: World, folder: Path, seed: int) -> None:
    """`val_balanced_questions.json` (our val), `testdev_balanced_questions.json` (our test) and `images/`."""
    rng = Random(f"{seed}/gqa/questions")
    count = 0
    for split, name in (("val", "val"), ("test", "testdev")):
        content: dict[str, dict[str, Any]] = {}
        for scene, questions in world.sources["gqa"][split]:
            count += 1
            question = _one(rng, questions)
            image_id = f"n{count:06d}"
            content[f"{count:08d}"] = {
                "imageId": image_id,
                "question": question.text,
                "answer": question.answer,
                "fullAnswer": f"{question.answer[0].upper()}{question.answer[1:]}.",
                "isBalanced": True,
                "groups": {"global": question.family, "local": None},
                "entailed": [],
                "equivalent": [f"{count:08d}"],
                "types": {
                    "structural": _STRUCTURE.get(question.family, "query"),
                    "semantic": "rel" if "relation" in question.family else "attr",
                    "detailed": question.family,
                },
                "semantic": [],
                "semanticStr": "",
                "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
            }
            put(folder / "images" / f"{image_id}.jpg", encoded(scene))
        put(folder / f"{name}_balanced_questions.json", content)


def write_textvqa(world: World, folder: Path, seed: int) -> None:
    """v0.5.1 and Rosetta OCR files of `train` (our val) and `val` (our test), pictures in `train_images/`."""
    rng = Random(f"{seed}/textvqa/annotators")
    count = 0
    for split, part in (("val", "train"), ("test", "val")):
        data: list[dict[str, Any]] = []
        ocr: list[dict[str, Any]] = []
        for scene, questions in world.sources["textvqa"][split]:
            count += 1
            image_id = f"{count:016x}"
            question = _one(rng, questions)
            misread = [question.answer[:-1], question.answer + question.answer[-1], "unanswerable"]
            data.append(
                {
                    "question": question.text,
                    "image_id": image_id,
                    "image_classes": ["Sign"],
                    "flickr_original_url": "",
                    "flickr_300k_url": "",
                    "image_width": SIZE,
                    "image_height": SIZE,
                    "answers": _opinions(rng, question.answer, misread),
                    "question_tokens": question.text.lower().rstrip("?").split(),
                    "question_id": count,
                    "set_name": part,
                }
            )
            signs = [item.name for item in scene.of("sign")]
            ocr.append({"image_id": image_id, "ocr_tokens": signs, "ocr_info": [{"word": word} for word in signs]})
            put(folder / "train_images" / f"{image_id}.jpg", encoded(scene))
        head = {"dataset_type": part, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        put(folder / f"TextVQA_0.5.1_{part}.json", {**head, "data": data})
        ocr_head = {"dataset_type": part, "dataset_name": "textvqa", "dataset_version": "0.2"}
        put(folder / f"TextVQA_Rosetta_OCR_v0.2_{part}.json", {**ocr_head, "data": ocr})


WRITERS: dict[str, Callable[[World, Path, int], None]] = {
    "okvqa": write_okvqa,
    "ocrvqa": write_ocrvqa,
    "gqa": write_gqa,
    "textvqa": write_textvqa,
}
