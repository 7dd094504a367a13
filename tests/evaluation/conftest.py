"""The random LLaVA with weights that make it decide clearly, pictures, and prepared task folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer


@dataclass
class World:
    """What `generate_answers` and `evaluate` need."""

    model: LlavaForConditionalGeneration
    tokenizer: LlavaTokenizer
    preprocessor: ImagePreprocessor


@pytest.fixture(scope="session")
def world(checkpoint: Path) -> World:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        # Large weights: answers depend on prompt and image, and the best token is clear of rounding.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return World(model, LlavaTokenizer.from_dir(checkpoint), ImagePreprocessor.from_dir(checkpoint))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        Image.new("RGB", (10 + i, 12), (40 * i, 255 - 50 * i, 30)).save(folder / f"{i}.png")
    return folder


PrepareTask = Callable[..., Path]


@pytest.fixture
def prepare_task(tmp_path: Path, pictures: Path) -> PrepareTask:
    """`prepare_task(name, gold, ids)` writes a prepared folder with a `test` split below `tmp_path/data`."""

    def prepare(name: str, gold: Any, ids: list[Any], **manifest: Any) -> Path:
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        questions = [
            {"question_id": q, "image": f"{n % 5}.png", "text": f"what is {n} ?", "category": "default"}
            for n, q in enumerate(ids)
        ]
        (folder / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
        (folder / "test_annotations.json").write_text(json.dumps(gold))
        content = {
            "name": name,
            "splits": {"test": {"n": len(ids)}},
            "image_folder": str(Path("../../..") / pictures.relative_to(tmp_path.parent)),
            "prompt_style": "short answer",
            **manifest,
        }
        (folder / "manifest.json").write_text(json.dumps(content))
        return folder

    return prepare
