"""The committed tiny checkpoint is the one its recipe describes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from llava_sculpt.tiny.pretraining.readme import model_card
from llava_sculpt.tiny.pretraining.vocabulary import VOCABULARY, train_tokenizer

FOLDER = Path(__file__).parents[2] / "data" / "tiny_llava"


@pytest.fixture(scope="module")
def recipe() -> dict:
    return json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))


def test_hash_and_card_belong_to_the_weights(recipe: dict) -> None:
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest == recipe["sha256"]
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == model_card(recipe)


def test_the_tokenizer_is_the_one_of_the_code(recipe: dict) -> None:
    assert (FOLDER / "tokenizer.model").read_bytes() == train_tokenizer(recipe["seed"])


def test_it_is_small_and_complete() -> None:
    names = {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.model",
        "recipe.json",
    }
    assert names <= {file.name for file in FOLDER.iterdir()}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10_000_000


def test_ids_behind_the_tokenizer(recipe: dict) -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config.get("image_token_id", config.get("image_token_index")) == VOCABULARY
    assert config["text_config"]["pad_token_id"] == VOCABULARY + 1
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        total = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert total == recipe["parameters"]


def test_it_is_good_enough_to_forget(recipe: dict) -> None:
    scores = [families["all"] for families in recipe["validation_exact_match"].values()]
    assert min(scores) >= 75
    assert sum(scores) / len(scores) >= 85
