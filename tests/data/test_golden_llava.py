"""Ids, labels and pixels are those of the original LLaVA package, recorded by make_golden.py."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from llava_sculpt.data.conversation import IGNORE_INDEX, encode_prompt, encode_record
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer

from .golden_images import write_image


def test_ids_and_labels_of_every_sample(golden: dict[str, Any], tokenizer: LlavaTokenizer) -> None:
    assert len(golden["samples"]) >= 25
    for sample in golden["samples"]:
        ids, labels = encode_record(sample["record"], tokenizer)
        assert ids == sample["input_ids"], sample["record"]
        assert labels == sample["labels"], sample["record"]
        assert any(label != IGNORE_INDEX for label in sample["labels"]), "the original masked it: no evidence"


def test_pixels_of_every_image(golden: dict[str, Any], preprocessor: ImagePreprocessor, tmp_path: Path) -> None:
    samples = [sample for sample in golden["samples"] if "image" in sample["record"]]
    assert len(samples) >= 10
    for sample in samples:
        pixels = preprocessor(load_rgb(write_image(tmp_path, sample["record"]["image"])))
        assert pixels.dtype == torch.float32
        assert list(pixels.shape) == sample["pixels_shape"]
        digest = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
        assert digest == sample["pixels_sha256"], sample["record"]["image"]


def test_generation_prompts(golden: dict[str, Any], tokenizer: LlavaTokenizer) -> None:
    for prompt in golden["prompts"]:
        assert encode_prompt(prompt["question"], tokenizer, prompt["has_image"]) == prompt["input_ids"], prompt
