"""Fixtures of the data tests: the small tokenizer and image settings that the golden data was made with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    return HERE / "fixtures"


@pytest.fixture(scope="session")
def tokenizer(fixtures_dir: Path) -> LlavaTokenizer:
    return LlavaTokenizer.from_dir(fixtures_dir)


@pytest.fixture(scope="session")
def preprocessor(fixtures_dir: Path) -> ImagePreprocessor:
    return ImagePreprocessor.from_dir(fixtures_dir)


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HERE / "golden_llava.json").read_text(encoding="utf-8"))
    return data


@pytest.fixture()
def make_record() -> Callable[..., dict[str, Any]]:
    def make(*texts: str, image: str | None = None) -> dict[str, Any]:
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"conversations": turns} if image is None else {"image": image, "conversations": turns}

    return make
