"""What the loaders are compared on: an adapter for the tiny LLaVA, 200 questions of its world."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_sculpt.experiments.tiny_data import prepare_tiny_world
from llava_sculpt.model.adapter import save_adapter
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.load import load_base
from llava_sculpt.model.lora import connector_weights, inject_lora, lora_pairs

TINY = Path(__file__).parents[2] / "data" / "tiny_llava"
TASKS = ("okvqa", "ocrvqa", "gqa", "textvqa", "iconqa")
PER_TASK = 40
WITH_LOGITS = range(0, 200, 25)  # questions whose next-token logits are compared as well
NEW_TOKENS = 16


def make_adapter(folder: Path, connector: str = "full", density: float = 0.1, base: Path = TINY) -> Path:
    """A sparse adapter of rank 16 with a changed connector, from NumPy's generator: the same on every machine."""
    rng = np.random.default_rng(7)

    def normal(like: torch.Tensor, std: float) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, std, tuple(like.shape)).astype(np.float32))

    model = load_base(find_base_checkpoint(str(base)), torch.float32)
    model = inject_lora(model, r=16, lora_alpha=32, dropout=0.05, connector=connector)
    with torch.no_grad():
        for pair in lora_pairs(model):
            for matrix in (pair.lora_A, pair.lora_B):
                kept = torch.from_numpy(rng.random(tuple(matrix.shape)) < density)
                matrix.copy_(normal(matrix, 0.23) * kept)
        if connector == "full":
            for weight in connector_weights(model).values():
                weight.add_(normal(weight, 0.01))
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, folder, state, str(base))
    return folder


def make_questions(folder: Path) -> list[dict[str, Any]]:
    """The first 40 test questions of five tasks; `image` is relative to `folder`."""
    prepare_tiny_world(folder)
    questions = []
    for task in TASKS:
        images = json.loads((folder / task / "manifest.json").read_text())["image_folder"]
        for line in (folder / task / "test.jsonl").read_text().splitlines()[:PER_TASK]:
            question = json.loads(line)
            image = (folder / task / images / question["image"]).resolve().relative_to(folder.resolve())
            questions.append({"text": question["text"], "image": str(image)})
    return questions


def questions_hash(folder: Path, questions: list[dict[str, Any]]) -> str:
    """sha256 of all texts and image files."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(question["text"].encode() + (folder / question["image"]).read_bytes())
    return digest.hexdigest()
