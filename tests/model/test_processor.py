"""A written model in stock transformers: the documented lines, run, give ids, pixels and answers of `eval`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.artifacts.merge import rewrite_checkpoint
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.evaluation.generate import generate_answers
from llava_sculpt.model.checkpoint import find_base_checkpoint

QUESTIONS = (
    "What is this?\nAnswer the question using a single word or phrase.",
    "  two spaces,\n\nan empty line and a picture that is high?",
)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random LLaVA with weights so large that its answers depend on prompt and picture, and two pictures."""
    folder = tmp_path_factory.mktemp("written")

    def louder(name: str, weight: torch.Tensor) -> torch.Tensor:
        return 8 * weight if weight.ndim > 1 else weight

    rewrite_checkpoint(find_base_checkpoint(str(checkpoint)), folder / "model", louder)
    rng = np.random.default_rng(0)
    for number, size in enumerate(((20, 31, 3), (33, 12, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_the_documented_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "interop.md").read_text()
    block = text.partition("\n## transformers\n")[2].partition("```python\n")[2].partition("```")[0]
    loaded = load_for_inference(str(folder / "model"), dtype=torch.float32)
    asked = [{"text": question, "image": f"{number}.png"} for number, question in enumerate(QUESTIONS)]
    [answers] = generate_answers(loaded.model, loaded.tokenizer, loaded.preprocessor, asked, folder, 2, 16)
    assert len(set(answers.values())) == 2 and all(answers.values())
    settings = "".join(line for line in block.splitlines(True) if line.startswith(("folder, file = ", "question = ")))
    assert settings.count("\n") == 2 and settings in block
    for number, question in enumerate(QUESTIONS):
        own = f"folder, file, question = {str(folder / 'model')!r}, {str(folder / f'{number}.png')!r}, {question!r}\n"
        names: dict[str, object] = {}
        # Later tokens of the random model are near-ties, which rounding decides between.
        exec(block.replace(settings, own).replace("max_new_tokens=128", "max_new_tokens=16"), names)
        inputs, output = names["inputs"], names["output"]
        said = output[0, inputs["input_ids"].shape[1] :]  # type: ignore[index]
        # The random model says bytes that are no text, which the two tokenizers write differently.
        assert loaded.tokenizer.decode(said.tolist()).strip() == answers[number]
        assert capsys.readouterr().out.strip()
        image = Image.open(folder / f"{number}.png").convert("RGB")
        assert torch.equal(inputs["pixel_values"][0], loaded.preprocessor(image))  # type: ignore[index]


@pytest.mark.parametrize("question", QUESTIONS)
def test_ids_by_either_way(folder: Path, question: str) -> None:
    loaded_processor = AutoProcessor.from_pretrained(folder / "model")
    base = find_base_checkpoint(str(folder / "model"))
    tokenizer = load_for_inference(str(folder / "model")).tokenizer
    image_ids = [base.image_token_id] * base.image_tokens
    expected: list[int] = []
    for token in encode_prompt(question, tokenizer, has_image=True):
        expected += image_ids if token < 0 else [token]
    parts = [{"type": "image", "image": Image.open(folder / "0.png")}, {"type": "text", "text": question}]
    whole = loaded_processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert list(np.ravel(whole["input_ids"])) == expected and expected.count(tokenizer.bos_id) == 1
    # A text that brings the image's place itself, as lmms-eval sends it.
    text = loaded_processor.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{question}"}], add_generation_prompt=True
    )
    assert loaded_processor(text=text, images=Image.open(folder / "0.png"))["input_ids"][0] == expected
    assert loaded_processor.tokenizer.pad_token_id == base.pad_token_id
