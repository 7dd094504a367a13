"""The tiny world: reproducible, no picture twice, official formats that `prepare` accepts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from llava_sculpt.evaluation.score_files import score_files
from llava_sculpt.tasks import prepare_benchmark
from llava_sculpt.tiny import draw
from llava_sculpt.tiny.draw import draw_pretraining, draw_world
from llava_sculpt.tiny.scenes import render
from llava_sculpt.tiny.world import write_raw_world

# What `score` takes of each task's raw files.
OFFICIAL_ANNOTATIONS = {
    "iconqa": "iconqa_data/problems.json",
    "coco": "annotations/captions_val2014.json",
    "okvqa": "mscoco_val2014_annotations.json",
    "ocrvqa": "dataset.json",
    "gqa": "testdev_balanced_questions.json",
    "textvqa": "TextVQA_0.5.1_val.json",
}
TASKS = ("iconqa", "coco", "okvqa", "ocrvqa", "gqa", "textvqa")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world of a few pictures per split."""
    monkeypatch.setattr(draw, "ICONQA_SIZES", {"train": 30, "val": 8, "test": 8})
    monkeypatch.setattr(draw, "COCO_SIZES", {"train": 12, "val": 6, "test": 6})
    monkeypatch.setattr(draw, "SOURCE_SIZES", {n: {"val": 8, "test": 9} for n in draw.SOURCE_SIZES})


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def test_same_seed_same_bytes_and_another_seed_another_world(small: None, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_raw_world(tmp_path / name, seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_writing_again_replaces_the_world_and_leaves_nothing_else(small: None, tmp_path: Path) -> None:
    write_raw_world(tmp_path, 1)
    write_raw_world(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_no_picture_in_two_splits() -> None:
    world = draw_world(0)
    tasks = {"iconqa": world.iconqa, "coco": world.coco, **world.sources}
    owner: dict[bytes, tuple[str, str]] = {}
    for task, splits in tasks.items():
        for split, samples in splits.items():
            for scene, _ in samples:
                pixels = hashlib.sha256(render(scene).tobytes()).digest()
                assert owner.setdefault(pixels, (task, split)) == (task, split)


def test_pretraining_has_no_picture_of_the_world() -> None:
    world = draw_world(0)
    held = {s for task in (world.iconqa, world.coco, *world.sources.values()) for v in task.values() for s, _ in v}
    drawn = {scene for samples in draw_pretraining(0, {"gqa": 50, "ocrvqa": 50}).values() for scene, _ in samples}
    assert len(drawn) == 100
    assert not drawn & held


def test_choices_are_fair() -> None:
    train = draw_world(0).iconqa["train"]
    counts = Counter((len(choice.choices), choice.answer) for _, choice in train)
    for n in (3, 4, 5):
        total = sum(counts[n, position] for position in range(n))
        assert total > 500
        for position in range(n):  # 5 standard deviations
            expected = total / n
            assert abs(counts[n, position] - expected) < 5 * (expected * (1 - 1 / n)) ** 0.5
    for _, choice in train:
        assert len(set(choice.choices)) == len(choice.choices)
    assert {choice.family for _, choice in train} == {"present", "missing", "corner", "color", "kind", "text"}


def test_exactly_one_choice_is_right() -> None:
    for scene, choice in draw_world(0).iconqa["test"]:
        labels = {item.label for item in scene.items}
        shown = [text in labels for text in choice.choices]
        if choice.family in ("present", "text"):
            assert [i for i, here in enumerate(shown) if here] == [choice.answer]
        elif choice.family == "missing":
            assert [i for i, here in enumerate(shown) if not here] == [choice.answer]


def test_official_formats(small: None, tmp_path: Path) -> None:
    write_raw_world(tmp_path)
    raw = tmp_path / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(TASKS)

    splits = read(raw / "iconqa/iconqa_data/pid_splits.json")
    assert {name: len(pids) for name, pids in splits.items()} == {
        "choose_txt_train": 30,
        "choose_txt_val": 8,
        "choose_txt_test": 8,
    }
    problem = read(raw / f"iconqa/iconqa_data/iconqa/val/choose_txt/{splits['choose_txt_val'][0]}/data.json")
    assert {"question", "choices", "answer", "ques_type", "grade", "label"} <= problem.keys()

    image = read(raw / "coco/dataset_coco.json")["images"][0]
    assert {"filepath", "filename", "cocoid", "imgid", "split", "sentids", "sentences"} <= image.keys()
    assert len({sentence["raw"] for sentence in image["sentences"]}) == 5
    assert (raw / "coco" / image["filepath"] / image["filename"]).is_file()

    record = read(raw / "okvqa/mscoco_val2014_annotations.json")["annotations"][0]
    assert len(record["answers"]) == 10
    assert Counter(a["answer"] for a in record["answers"]).most_common(1)[0][1] >= 6
    assert len(read(raw / "textvqa/TextVQA_0.5.1_val.json")["data"][0]["answers"]) == 10
    assert {book["split"] for book in read(raw / "ocrvqa/dataset.json").values()} == {2, 3}
    for record in read(raw / "gqa/testdev_balanced_questions.json").values():
        assert {"imageId", "question", "answer", "fullAnswer", "isBalanced", "types"} <= record.keys()


@pytest.mark.parametrize("task", TASKS)
def test_prepare_accepts_it(small: None, tmp_path: Path, task: str) -> None:
    write_raw_world(tmp_path)
    manifest = prepare_benchmark(task, tmp_path / "raw" / task, tmp_path / task)
    assert {"val", "test"} <= manifest["splits"].keys()
    assert ("train" in manifest["splits"]) == (task in ("iconqa", "coco"))


def test_score_takes_the_raw_files_as_it_takes_the_official_ones(small: None, tmp_path: Path) -> None:
    write_raw_world(tmp_path)
    prepare_benchmark("coco", tmp_path / "raw/coco", tmp_path / "official/coco", train_captions="official")
    for task, file in OFFICIAL_ANNOTATIONS.items():
        raw, out = tmp_path / "raw" / task, tmp_path / "out" / task
        prepare_benchmark(task, raw, out)
        ids = [json.loads(line)["question_id"] for line in (out / "test.jsonl").read_text().splitlines()]
        texts = ["A", "two dogs", "stop", "red"]
        pairs = [(question_id, texts[n % 4]) for n, question_id in enumerate(ids)]
        own = tmp_path / f"{task}.jsonl"
        own.write_text("".join(json.dumps({"question_id": q, "text": text}) + "\n" for q, text in pairs))
        found = score_files(task, own, raw / file, questions=out / "test.jsonl", tokenizer="python")
        if task == "coco":  # captions of val are in the file too, as in the official one
            assert found["n"] == len(ids)
        else:
            expected = score_files(task, own, out / "test_annotations.json")
            assert (found["score"], found["n"]) == (expected["score"], expected["n"])
