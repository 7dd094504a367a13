"""Four ways to load one adapter give the same answers: stock peft, the original package, our own, a merged model.

The original's part was recorded (make_interop_golden.py), with float32 everywhere.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.data.collator import left_pad
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.evaluation.generate import generate_answers
from tests.model import interop
from tests.model.interop import TINY

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden_interop.json").read_text())


class World:
    """The 200 questions, and what a model makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.questions = interop.make_questions(folder)
        self.tokenizer = LlavaTokenizer.from_dir(TINY)
        self.preprocessor = ImagePreprocessor.from_dir(TINY)

    def is_golden(self) -> bool:
        return interop.questions_hash(self.folder, self.questions) == GOLDEN["sha256"]

    def answers(self, model: nn.Module) -> list[str]:
        answers: dict[int, str] = {}
        for batch in generate_answers(
            model, self.tokenizer, self.preprocessor, self.questions, self.folder, 50, interop.NEW_TOKENS
        ):
            answers |= batch
        return [answers[place] for place in range(len(self.questions))]

    @torch.inference_mode()
    def logits(self, model: nn.Module) -> torch.Tensor:
        """Of the next token, without the rows behind the vocabulary, which the original does not have."""
        rows = []
        dtype = next(model.parameters()).dtype
        for number in interop.WITH_LOGITS:
            question = self.questions[number]
            prompt = encode_prompt(question["text"], self.tokenizer, has_image=True)
            vocabulary = self.tokenizer.vocab_size
            inputs = left_pad([prompt], vocabulary + 1, vocabulary, 36)
            pixels = self.preprocessor(load_rgb(self.folder / question["image"]))[None].to(dtype)
            rows.append(model.eval()(**inputs, pixel_values=pixels).logits[0, -1, :vocabulary])
        return torch.stack(rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def golden(world: World) -> World:
    if not world.is_golden():
        pytest.skip("this Pillow draws other pictures than the recorded answers are about: make the golden files anew")
    return world


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interop.make_adapter(tmp_path_factory.mktemp("adapter") / "run")


@pytest.fixture(scope="module")
def loaded(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    stock = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32), str(adapter)
    )
    connector = load_file(adapter / "connector.safetensors")
    assert not stock.get_base_model().load_state_dict(connector, strict=False).unexpected_keys
    merged = tmp_path_factory.mktemp("merged") / "model"
    command = [sys.executable, "-m", "llava_sculpt.cli", "merge", str(adapter), "--base", str(TINY), "--dtype", "fp32"]
    done = subprocess.run([*command, "--out", str(merged)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout
    return {
        "stock": stock,
        "ours": load_for_inference(str(adapter), dtype=torch.float32).model,
        "merged": LlavaForConditionalGeneration.from_pretrained(merged),
    }


def test_three_loaders_answer_alike(world: World, loaded: dict[str, nn.Module]) -> None:
    answers = {name: world.answers(model) for name, model in loaded.items()}
    assert len(answers["ours"]) == 200
    assert answers["stock"] == answers["ours"] == answers["merged"]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, in units of the largest logit (17 here, where float32 alone is 1e-5 away from float64)."""
    return float((one - other).abs().max() / other.abs().max())


def test_merged_and_unmerged_logits(world: World, loaded: dict[str, nn.Module]) -> None:
    ours = world.logits(loaded["ours"])
    assert torch.equal(world.logits(loaded["stock"]), ours)
    assert distance(world.logits(loaded["merged"]), ours) <= 2e-6
    # In float64 only the rounding of the merged weights to float32 is left.
    merged, unmerged = (world.logits(copy.deepcopy(loaded[name]).double()) for name in ("merged", "ours"))
    assert (merged - unmerged).abs().max() <= 1e-5


def test_the_original_answers_alike(golden: World, loaded: dict[str, nn.Module]) -> None:
    assert golden.answers(loaded["ours"]) == GOLDEN["answers"]["adapter"]
    changed = sum(a != b for a, b in zip(GOLDEN["answers"]["adapter"], GOLDEN["answers"]["base"], strict=True))
    assert changed > 15  # the adapter matters


def test_the_originals_logits(golden: World, loaded: dict[str, nn.Module]) -> None:
    recorded = load_file(HERE / "golden_interop.safetensors")
    base = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    assert distance(golden.logits(base), recorded["base"]) <= 2e-6
    assert distance(golden.logits(loaded["ours"]), recorded["adapter"]) <= 2e-6
    assert golden.answers(base) == GOLDEN["answers"]["base"]
