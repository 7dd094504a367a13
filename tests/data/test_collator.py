"""Batches: image tokens, truncation, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_sculpt.data.collator import TrainCollator, left_pad
from llava_sculpt.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX

PAD, IMAGE = 91, 90
PICTURE = {
    "input_ids": torch.tensor([1, 5, IMAGE_TOKEN_INDEX, 6, 7, 2]),
    "labels": torch.tensor([-100, -100, -100, -100, 7, 2]),
    "pixel_values": torch.full((3, 4, 4), 0.5),
}
TEXT = {
    "input_ids": torch.tensor([1, 8, 9, 2]),
    "labels": torch.tensor([-100, -100, 9, 2]),
    "pixel_values": None,
}


def collate(samples: list[dict[str, Any]], model_max_length: int = 100) -> dict[str, torch.Tensor]:
    return TrainCollator(PAD, IMAGE, image_tokens=3, image_size=4, model_max_length=model_max_length)(samples)


def test_a_mixed_batch() -> None:
    batch = collate([TEXT, PICTURE])
    assert batch["input_ids"].tolist() == [[1, 8, 9, 2, PAD, PAD, PAD, PAD], [1, 5, IMAGE, IMAGE, IMAGE, 6, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert batch["labels"].tolist() == [[-100, -100, 9, 2, *[IGNORE_INDEX] * 4], [*[-100] * 6, 7, 2]]
    assert torch.equal(batch["pixel_values"], PICTURE["pixel_values"][None])
    assert {value.dtype for key, value in batch.items() if key != "pixel_values"} == {torch.int64}


def test_logits_are_asked_for_where_a_next_token_is_trained_on() -> None:
    several = {**TEXT, "labels": torch.tensor([-100, 8, -100, 2])}
    batch = collate([PICTURE, several])
    assert batch["logits_to_keep"].tolist() == [[5, 6], [0, 2]] and batch["shift_labels"].tolist() == [[7, 2], [8, 2]]
    fewer = {**TEXT, "labels": torch.tensor([-100, -100, -100, 2])}
    batch = collate([PICTURE, fewer])
    assert batch["logits_to_keep"][1, 0] == 2 and batch["shift_labels"][1].tolist() == [2, IGNORE_INDEX]
    nothing = {**TEXT, "labels": torch.full((4,), IGNORE_INDEX)}  # as after a cut
    batch = collate([nothing])
    assert batch["shift_labels"].tolist() == [[IGNORE_INDEX]] * 2 and batch["logits_to_keep"].shape == (2, 1)


def test_without_images_an_empty_one_is_added_that_teaches_nothing() -> None:
    batch = collate([TEXT, TEXT])
    assert batch["input_ids"].tolist() == [[1, 8, 9, 2], [1, 8, 9, 2], [IMAGE, IMAGE, IMAGE, PAD]]
    assert batch["labels"][2].tolist() == [IGNORE_INDEX] * 4
    assert batch["pixel_values"].shape == (1, 3, 4, 4) and not batch["pixel_values"].any()


def test_samples_are_cut_after_the_image_got_its_room() -> None:
    batch = collate([PICTURE], model_max_length=7)
    assert batch["input_ids"].tolist() == [[1, 5, IMAGE, IMAGE, IMAGE, 6, 7]]
    assert batch["labels"].tolist() == [[*[-100] * 6, 7]]


def test_a_cut_through_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="cuts through an image"):
        collate([PICTURE], model_max_length=4)


def test_image_and_placeholder_must_match() -> None:
    with pytest.raises(ValueError, match="1 image placeholders"):
        collate([{**PICTURE, "pixel_values": None}])
    with pytest.raises(ValueError, match="0 image placeholders"):
        collate([{**TEXT, "pixel_values": PICTURE["pixel_values"]}])


def test_prompts_are_padded_on_the_left() -> None:
    batch = left_pad([[1, IMAGE_TOKEN_INDEX, 4], [1, 4]], PAD, IMAGE, image_tokens=2)
    assert batch["input_ids"].tolist() == [[1, IMAGE, IMAGE, 4], [PAD, PAD, 1, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
