"""The data set: what it returns, and that everything wrong with it is told at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_sculpt.data.conversation import IMAGE_TOKEN_INDEX
from llava_sculpt.data.dataset import MAX_PROBLEMS_SHOWN, LlavaDataset, validate_dataset
from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError

from .golden_images import write_image

MakeRecord = Callable[..., dict[str, Any]]


def write(folder: Path, records: Any) -> Path:
    path = folder / "train.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


@pytest.fixture()
def open_dataset(
    tmp_path: Path, tokenizer: LlavaTokenizer, preprocessor: ImagePreprocessor
) -> Callable[..., LlavaDataset]:
    def build(records: Any, model_max_length: int = 2048) -> LlavaDataset:
        path = write(tmp_path, records)
        return LlavaDataset(path, tmp_path, tokenizer, preprocessor, model_max_length, image_tokens=36)

    return build


def test_items_and_lengths(tmp_path: Path, make_record: MakeRecord, open_dataset: Callable[..., LlavaDataset]) -> None:
    write_image(tmp_path, "20x30-RGB.png")
    records = [make_record("<image>\nWhat?", "dog", image="20x30-RGB.png"), make_record("Who?", "me")]
    dataset = open_dataset(records)
    assert len(dataset) == 2
    picture, text = dataset[0], dataset[1]
    assert picture["input_ids"].dtype == picture["labels"].dtype == torch.int64
    assert picture["input_ids"].tolist().count(IMAGE_TOKEN_INDEX) == 1
    assert picture["pixel_values"].shape == (3, 48, 48)
    assert text["pixel_values"] is None
    assert dataset.modality_lengths == [len(picture["input_ids"]) + 35, -len(text["input_ids"])]
    assert open_dataset(records[1:], model_max_length=42).modality_lengths == [-42]


def test_a_cut_that_costs_the_image_or_every_answer_is_an_error(
    make_record: MakeRecord, open_dataset: Callable[..., LlavaDataset]
) -> None:
    records = [make_record("<image>\nWhat?", "dog", image="a.png"), make_record("Who?", "me")]
    with pytest.raises(UserError) as caught:
        open_dataset(records, model_max_length=39)
    first, second = caught.value.problems
    assert "record 1 of 2" in first and "the image ends at token" in first
    assert "record 2 of 2" in second and "the first answer is at token" in second
    first_answer = open_dataset(records[:1]).modality_lengths[0] - len(("dog", "</s>"))
    with pytest.raises(UserError, match="record 1 of 1: the first answer is at token"):
        open_dataset(records[:1], model_max_length=first_answer)


def test_everything_wrong_is_told_with_file_and_record(tmp_path: Path, make_record: MakeRecord) -> None:
    write_image(tmp_path, "20x30-RGB.png")
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "20x30-RGB.png").read_bytes()[:-500])
    records = [
        make_record("<image>", "dog", image="20x30-RGB.png"),
        make_record("<image>", "", image="missing.png"),
        {"id": "x7", **make_record("<image>", "dog", image="zero.png")},
        make_record("<image>", "dog", image="cut.png"),
        {"id": 4},
        make_record("no placeholder", "dog", image="20x30-RGB.png"),
    ]
    path = write(tmp_path, records)
    with pytest.raises(UserError) as caught:
        validate_dataset(path, tmp_path)
    problems = caught.value.problems
    assert len(problems) == 6
    assert all(problem.startswith(f"{path}: record ") for problem in problems)
    for words in ("record 2 of 6: answer 1 is empty", "record 2 of 6: the image is missing", "cut short",
                  "record 3 of 6 (id 'x7'): the image file is empty", "record 5 of 6 (id 4): has no 'conv",
                  "record 6 of 6: has an 'image' but no <image>"):  # fmt: skip
        assert any(words in problem for problem in problems), words
    validate_dataset(write(tmp_path, records[:1]), tmp_path)


def test_images_are_inside_the_image_folder_unless_they_may_be_elsewhere(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    folder = tmp_path / "images"
    for place in (folder, tmp_path):
        place.mkdir(exist_ok=True)
        write_image(place, "20x30-RGB.png")
    (folder / "linked").symlink_to(tmp_path)
    inside = ["20x30-RGB.png", "./a/../20x30-RGB.png", str(folder / "20x30-RGB.png"), "linked/20x30-RGB.png"]
    (folder / "a").mkdir()
    validate_dataset(write(tmp_path, [make_record("<image>", "dog", image=name) for name in inside]), folder)
    outside = ["../20x30-RGB.png", str(tmp_path / "20x30-RGB.png")]
    path = write(tmp_path, [make_record("<image>", "dog", image=name) for name in outside])
    with pytest.raises(UserError, match=r"record 2 of 2: the image .* is not inside the image folder") as caught:
        validate_dataset(path, folder)
    assert len(caught.value.problems) == 2
    validate_dataset(path, folder, allow_outside=True)


def test_the_fingerprint_of_the_images_follows_their_content(tmp_path: Path, make_record: MakeRecord) -> None:
    write_image(tmp_path, "20x30-RGB.png")
    path = write(tmp_path, [make_record("<image>", "dog", image="20x30-RGB.png")])
    before = validate_dataset(path, tmp_path).images
    image = tmp_path / "20x30-RGB.png"
    with Image.open(image) as picture:
        picture.point(lambda value: 0).save(image)
    assert validate_dataset(path, tmp_path).images != before


def test_a_long_list_is_cut_and_counted(tmp_path: Path, make_record: MakeRecord) -> None:
    with pytest.raises(UserError) as caught:
        validate_dataset(write(tmp_path, [make_record("q", "")] * 33), None)
    assert len(caught.value.problems) == MAX_PROBLEMS_SHOWN + 1
    assert "and 13 more problems" in caught.value.problems[-1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"id": 1},', "not valid JSON .line 1"),
        ('{"id": 1}\n{"id": 2}', "JSON lines"),
        ('{"id": 1}', "must hold a JSON list"),
        ("[]", "holds no samples"),
        ("", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_data_set(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate_dataset(write(tmp_path, content), tmp_path)


def test_a_file_or_folder_that_is_not_there(tmp_path: Path, make_record: MakeRecord) -> None:
    with pytest.raises(UserError, match=r"none\.json: file not found"):
        validate_dataset(tmp_path / "none.json", tmp_path)
    with pytest.raises(UserError, match="a folder, not a file"):
        validate_dataset(tmp_path, tmp_path)
    path = write(tmp_path, [make_record("<image>", "dog", image="a.png")])
    with pytest.raises(UserError, match="there is no folder"):
        validate_dataset(path, tmp_path / "none")
    with pytest.raises(UserError, match="no image folder is given"):
        validate_dataset(path, None)
    (tmp_path / "train.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="cannot be read: 'utf-8' codec"):
        validate_dataset(path, tmp_path)
