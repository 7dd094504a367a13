"""The random LLaVA with weights that make it decide clearly, pictures, and prepared task folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_sculpt.artifacts.inference import Inference, load_for_inference


@pytest.fixture(scope="session")
def world(checkpoint: Path) -> Inference:
    loaded = load_for_inference(str(checkpoint))
    with torch.no_grad():
        # Large weights: answers depend on prompt and image, and the best token is clear of rounding.
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return loaded


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


def first_questions(root: Path, folder: Path, tasks: dict[str, int]) -> Path:
    """The first test questions of some tasks prepared in `root`, as prepared folders in `folder`."""

    def kept(gold: Any, ids: set[Any]) -> Any:
        if isinstance(gold, list):
            return [r for r in gold if r.get("question_id", r.get("image_id", r.get("id"))) in ids]
        return {
            k: kept(v, ids) if isinstance(v, list) else v for k, v in gold.items() if isinstance(v, list) or k in ids
        }

    for name, count in tasks.items():
        (folder / name).mkdir(parents=True)
        manifest = json.loads((root / name / "manifest.json").read_text())
        manifest["image_folder"] = str((root / name / manifest["image_folder"]).resolve())
        del manifest["files"]  # cut below
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
        lines = (root / name / "test.jsonl").read_text().splitlines(keepends=True)[:count]
        (folder / name / "test.jsonl").write_text("".join(lines))
        gold = json.loads((root / name / "test_annotations.json").read_text())
        cut = kept(gold, {json.loads(line)["question_id"] for line in lines})
        (folder / name / "test_annotations.json").write_text(json.dumps(cut))
    return folder
