"""Token ids, labels and pixels beside the original package, live: the golden set, and fuzzed conversations."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llava_sculpt.data.conversation import IGNORE_INDEX, encode_prompt, encode_record
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from tests.data.golden_images import write_image

DATA = Path(__file__).parents[1] / "data"
FUZZED = 1500
WORDS = r"""
a cat is on the mat What? 3.14 it's 'quoted' "double" New York's émigré naïve 東京 🙂 🙃 x=y+1 {json: [1, 2]} <b> </b>
<im age> <images USER USER: ASSISTANT ASSISTANT: user: System ### ### Human: [INST] <<SYS>> <s> <s>x <pad>
https://a.b/c?d=e&f ... - -- — 1,000 \n \ \\ ½ ﬁ ① é
""".split()
SPACES = [" ", " ", " ", "  ", "\n", "\n\n", "\t", " \n", "\u00a0", "\u3000", "\u2581", ""]
BREAKING = ["</s>", "<unk>", " ASSISTANT: ", "<image>"]  # what LLaVA loses a sample, or an image, over


def fuzzed_text(rng: random.Random, breaking: bool) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(0 if breaking else 1, 9))]
    if breaking and rng.random() < 0.3:
        words.insert(rng.randint(0, len(words)), rng.choice(BREAKING))
    edges = [rng.choice(SPACES) if rng.random() < 0.2 else "" for _ in range(2)]
    return edges[0] + "".join(word + rng.choice(SPACES) for word in words[:-1]) + "".join(words[-1:]) + edges[1]


def fuzzed_record(rng: random.Random, breaking: bool) -> dict[str, Any]:
    turns = []
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        turns.append({"from": "human", "value": fuzzed_text(rng, breaking)})
        turns.append({"from": "gpt", "value": fuzzed_text(rng, breaking)})
    if breaking and rng.random() < 0.1:
        del turns[rng.randrange(len(turns))]
    record: dict[str, Any] = {"conversations": turns}
    if rng.random() < 0.5 and turns:
        # From 4 pixels on: transformers 4.37 takes the rows of an image 1 or 3 pixels high for its channels.
        record["image"] = f"{rng.randint(4, 40)}x{rng.randint(4, 40)}-{rng.choice(['RGB', 'L', 'RGBA'])}.png"
        question = rng.choice(turns[::2])
        text = question["value"]
        question["value"] = rng.choice([f"<image>\n{text}", f"{text}\n<image>", f"{text}<image>", f" <image> {text}"])
    return record


def run_original(llava_python: Path, golden: dict[str, Any], file: Path) -> dict[str, Any]:
    """The same cases with the original's answers, through the script that made the stored ones."""
    file.write_text(json.dumps(golden))
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [str(llava_python), str(DATA / "make_golden.py"), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answered: dict[str, Any] = json.loads(file.read_text())
    return answered


def pixels_sha256(preprocessor: ImagePreprocessor, file: Path) -> str:
    return hashlib.sha256(preprocessor(load_rgb(file)).contiguous().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def tokenizer() -> LlavaTokenizer:
    return LlavaTokenizer.from_dir(DATA / "fixtures")


@pytest.fixture(scope="module")
def preprocessor() -> ImagePreprocessor:
    return ImagePreprocessor.from_dir(DATA / "fixtures")


def test_stored_golden_data_is_what_the_original_says(llava_python: Path, tmp_path: Path) -> None:
    stored = json.loads((DATA / "golden_llava.json").read_text())
    answered = run_original(llava_python, stored, tmp_path / "golden.json")
    assert answered["samples"] == stored["samples"]
    assert answered["prompts"] == stored["prompts"]


def test_fuzzed_conversations(
    llava_python: Path, tokenizer: LlavaTokenizer, preprocessor: ImagePreprocessor, tmp_path: Path
) -> None:
    rng = random.Random(0)
    cases = {"samples": [{"record": fuzzed_record(rng, breaking=i % 3 == 0)} for i in range(FUZZED)], "prompts": []}
    compared = refused = 0
    for sample in run_original(llava_python, cases, tmp_path / "fuzzed.json")["samples"]:
        record = sample["record"]
        # The original only warns of a sample that it will not learn from, or crashes on it while training.
        lost = "error" in sample or all(label == IGNORE_INDEX for label in sample["labels"])
        try:
            ids, labels = encode_record(record, tokenizer)
        except UserError as error:
            refused += 1
            assert all(problem.strip() for problem in error.problems)
            continue
        assert not lost, record
        assert (ids, labels) == (sample["input_ids"], sample["labels"]), record
        if "image" in record:
            assert pixels_sha256(preprocessor, write_image(tmp_path, record["image"])) == sample["pixels_sha256"]
        compared += 1
    assert compared >= 1000 and refused >= 50, (compared, refused)


def test_fuzzed_prompts(llava_python: Path, tokenizer: LlavaTokenizer, tmp_path: Path) -> None:
    rng = random.Random(1)
    prompts = [{"question": fuzzed_text(rng, False), "has_image": rng.random() < 0.5} for _ in range(300)]
    answered = run_original(llava_python, {"samples": [], "prompts": prompts}, tmp_path / "prompts.json")
    for prompt in answered["prompts"]:
        assert encode_prompt(prompt["question"], tokenizer, prompt["has_image"]) == prompt["input_ids"], prompt
