"""What the comparison with the original llava package needs: its interpreter, and one base model in both layouts.

The two packages want different versions of transformers, so the original runs in a process of its own, in the
environment that `make parity` builds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sculpt.cli import main

ROOT = Path(__file__).parents[2]
TINY = ROOT / "data" / "tiny_llava"


@pytest.fixture(scope="session")
def llava_python() -> Path:
    """The interpreter of the original package's environment; without it the test is skipped."""
    python = ROOT / ".venv-llava" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs the original LLaVA package (make parity)")
    return python


@pytest.fixture(scope="session")
def original_checkpoint(llava_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/tiny_llava as the original package reads it."""
    folder = tmp_path_factory.mktemp("original") / "tiny"
    assert main(["convert", "checkpoint", str(TINY), "--to", "original", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def even_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.json and images/: 16 samples, one in four without an image, all with equally many trained-on tokens.

    So the mean over tokens (main front end) and the mean of the processes' means (original) are one number, and with
    a batch of 16 neither sampler's order matters.
    """
    folder = tmp_path_factory.mktemp("even_data")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    records = []
    for index in range(16):
        question: dict[str, str] = {"from": "human", "value": f"What is number {index}?"}
        record: dict[str, object] = {"id": f"s{index}"}
        if index % 4:
            pixels = rng.integers(0, 256, (30 + index, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
            record["image"] = f"{index}.png"
            question["value"] = f"<image>\n{question['value']}"
        record["conversations"] = [question, {"from": "gpt", "value": f"number {index * 7 % 10}"}]
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    return folder
