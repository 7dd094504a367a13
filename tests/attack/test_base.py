"""Base checkpoints made wrong: refused before anything is loaded, or the same logits; never another adapter's base."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.cli import main
from llava_sculpt.model.files import RUN_FILE
from llava_sculpt.model.whole import seal_run
from tests.artifacts.test_rewrite import in_three_shards
from tests.attack.attack import break_file, fresh_copy, mutate_json_file, outcome
from tests.attack.test_adapter import weights
from tests.runs import Train

SMALL = ("config.json", "preprocessor_config.json", "generation_config.json", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In three shards, with an index and a generation_config.json."""
    folder = fresh_copy(checkpoint, tmp_path_factory.mktemp("bases") / "base")
    in_three_shards(folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.2, "top_p": 0.9}')
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(folder, model_name_or_path=base, max_steps=6) == 0
    seal_run(folder, json.loads((folder / RUN_FILE).read_text()))
    return folder


def answers(model: Path, base: Path | None = None) -> tuple[bytes, bytes, list[int]]:
    """Logits of a made-up question, the pixels of a made-up picture, the ids of a text."""
    loaded = load_for_inference(str(model), base=None if base is None else str(base), dtype=torch.float32)
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    image = [loaded.checkpoint.image_token_id] * loaded.checkpoint.image_tokens
    with torch.inference_mode():
        found = loaded.model(input_ids=torch.tensor([[1, 5, *image, 6, 7, 8]]), pixel_values=pixels).logits
    picture = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    return found.numpy().tobytes(), loaded.preprocessor(picture).numpy().tobytes(), loaded.tokenizer.encode("What?")


def damage(rng: random.Random, base: Path) -> str:
    """One file of a base changed; what it was."""
    shards = sorted(base.glob("*.safetensors"))
    kind = rng.randrange(10)
    if kind < 5:
        return mutate_json_file(rng, base / rng.choice(SMALL))
    if kind < 8:
        return break_file(rng, rng.choice([*(base / name for name in SMALL), base / "tokenizer.model", *shards]))
    file = rng.choice(shards)
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    value = tensors.pop(key)
    if kind == 8:
        tensors |= rng.choice(
            [{}, {f"{key}x": value}, {key: value[:1].clone()}, {key: value, "model.x": value.clone()}]
        )
        what = f"{file.name}: {key} missing, renamed or cut, or one more"
    else:
        value.view(-1)[rng.randrange(value.numel())] = float("nan")
        tensors[key] = value
        what = f"{file.name}: {key}: NaN"
    save_file(tensors, str(file), metadata={"format": "pt"})
    return what


def test_bases_of_an_adapter(
    base: Path, adapter: Path, tmp_path: Path, tries: Iterator[random.Random], capsys: pytest.CaptureFixture[str]
) -> None:
    """A base that changed after the training: refused, or the same model (what run.json says of it decides)."""
    expected = answers(adapter, base)
    assert main(["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "expected")]) == 0
    merged = weights(tmp_path / "expected")
    for rng in tries:
        copy = fresh_copy(base, tmp_path / "base")
        what = damage(rng, copy)
        if rng.random() < 0.6:
            found: list[tuple[bytes, bytes, list[int]]] = []
            code = outcome(lambda found=found, copy=copy: found.append(answers(adapter, copy))).code  # type: ignore[misc]
            assert code == 2 or found == [expected], what
            continue
        words = ["merge", str(adapter), "--base", str(copy), "--out", str(tmp_path / "out")]
        code = outcome(lambda words=words: main(words), capsys).code  # type: ignore[misc]
        assert code == 2 or weights(tmp_path / "out") == merged, what
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_bare_bases(
    base: Path, tmp_path: Path, tries: Iterator[random.Random], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another configuration may be another model; broken weights or a traceback may not be."""
    for rng in tries:
        copy = fresh_copy(base, tmp_path / "base")
        what = damage(rng, copy)
        found: list[tuple[bytes, bytes, list[int]]] = []
        code = outcome(lambda found=found, copy=copy: found.append(answers(copy))).code  # type: ignore[misc]
        if code == 0:
            assert torch.frombuffer(bytearray(found[0][0]), dtype=torch.float32).isfinite().all(), what
        else:
            words = ["convert", "checkpoint", str(copy), "--to", "original", "--out", str(tmp_path / "llava")]
            outcome(lambda words=words: main(words), capsys)  # type: ignore[misc]
            shutil.rmtree(tmp_path / "llava", ignore_errors=True)


def test_named_cases(base: Path, adapter: Path, tmp_path: Path) -> None:
    """100 layers, a width that is text, a changed rope_theta under an adapter."""

    def refused(change: dict[str, object], part: str) -> str:
        copy = fresh_copy(base, tmp_path / "base")
        config = json.loads((copy / "config.json").read_text())
        config[part].update(change)
        (copy / "config.json").write_text(json.dumps(config))
        return "\n".join(outcome(lambda: answers(copy)).lines)

    assert "weight model.language_model.layers.2." in refused({"num_hidden_layers": 100}, part="text_config")
    assert "hidden_size" in refused({"hidden_size": "64"}, part="vision_config")
    copy = fresh_copy(base, tmp_path / "base")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 20000.0
    (copy / "config.json").write_text(json.dumps(config))
    assert outcome(lambda: answers(copy)).code == 0
    assert "another base" in outcome(lambda: answers(adapter, copy)).lines[0]
