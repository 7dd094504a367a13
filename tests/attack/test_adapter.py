"""Adapter folders made wrong: refused by everything that reads them, or as good as the untouched ones."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, COMPLETE_FILE, CONNECTOR_FILE, MASKS_FILE, RUN_FILE
from llava_sculpt.model.whole import seal_run
from llava_sculpt.records import file_sha256
from tests.attack.attack import break_file, fresh_copy, mutate_json_file, outcome
from tests.runs import Train

WEIGHTS = (ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE)


@pytest.fixture(scope="module")
def folders(train: Train, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sealed runs, a checkpoint with its run, one of stock PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    for name, seed in (("run", 1), ("other", 2)):
        assert train(root / name, seed=seed, max_steps=8, save_steps=6, save_total_limit=2) == 0
        seal_run(root / name, json.loads((root / name / RUN_FILE).read_text()))
    saved = root / "run" / "checkpoint-6"
    hashes = {f.name: file_sha256(f) for f in saved.iterdir() if f.name != COMPLETE_FILE}
    (saved / COMPLETE_FILE).write_text(json.dumps(hashes))
    model = get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(checkpoint),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    model.save_pretrained(root / "stock", save_embedding_layers=False)
    return {"run": root / "run", "other": root / "other", "stock": root / "stock"}


def logits(folder: Path) -> torch.Tensor:
    loaded = load_for_inference(str(folder), dtype=torch.float32)
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    ids = torch.tensor([[1, 5] + [loaded.checkpoint.image_token_id] * 4 + [6, 7, 8]])
    with torch.inference_mode():
        return loaded.model(input_ids=ids, pixel_values=pixels).logits


def weights(folder: Path) -> dict[str, bytes]:
    """Bytes of every tensor below a folder, or of a file, by name."""
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else [folder]
    return {f"{f.name}/{k}": v.numpy().tobytes() for f in files for k, v in load_file(f).items()}


def readers(adapter: Path, out: Path) -> dict[str, list[str]]:
    """Every command that reads an adapter."""
    word, to = str(adapter), str(out)
    return {
        "inspect": ["inspect", word, "--json"],
        "merge": ["merge", word, "--out", to],
        "sparse": ["export", word, "--format", "sparse", "--out", to],
        "delta": ["export", word, "--format", "delta", "--out", to],
        "convert": ["convert", "adapter", word, "--to", "original", "--out", to],
        "post_prune": ["edit", "post_prune", "--adapter", word, "--out", to],
        "dare": ["edit", "dare", "--adapter", word, "--out", to],
    }


def result(adapter: Path, reader: str, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    """Exit code of a reader and what it made."""
    if reader == "logits":
        found: list[torch.Tensor] = []
        code = outcome(lambda: found.append(logits(adapter))).code
        return code, found[0].numpy().tobytes() if found else None
    capsys.readouterr()
    answers: list[str] = []

    def call() -> int:
        code = main(readers(adapter, out)[reader])
        captured = capsys.readouterr()
        answers.append(captured.out)
        assert code != 2 or "error: " in captured.err, captured
        return code

    code = outcome(call).code
    made = weights(out) if out.exists() else answers[0].replace(str(adapter), "")
    left = [path.name for path in out.parent.iterdir() if path.name not in (out.name, "run")]
    assert not left and (code == 0 or not out.exists()), left
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    return code, made if code == 0 else None


@pytest.fixture
def attack(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str, str, Callable[[Path], str], random.Random], None]]:
    """`attack(kind, place, change, rng)`: a reader of a changed copy refuses, or makes what it makes of the whole."""
    known: dict[tuple[str, str, str], Any] = {}
    readers_of = [*readers(tmp_path, tmp_path), "logits"]

    def run(kind: str, place: str, change: Callable[[Path], str], rng: random.Random) -> None:
        (tmp_path / "made").mkdir(exist_ok=True)
        reader = rng.choice(readers_of)
        if (kind, place, reader) not in known:
            whole = fresh_copy(folders[kind], tmp_path / "made" / "run")
            known[kind, place, reader] = result(whole / place, reader, tmp_path / "made" / "out", capsys)
        copy = fresh_copy(folders[kind], tmp_path / "made" / "run")
        what = change(copy / place)
        code, made = result(copy / place, reader, tmp_path / "made" / "out", capsys)
        assert code == 2 or (code, made) == known[kind, place, reader], f"{kind}/{place} {reader}: {what}"

    yield run


def test_records_made_wrong(attack: Any, tries: Iterator[random.Random]) -> None:
    """A field of run.json, complete.json or adapter_config.json."""
    for rng in tries:
        place = rng.choice(["", "checkpoint-6"])
        names = [ADAPTER_CONFIG, COMPLETE_FILE] if place else [ADAPTER_CONFIG, RUN_FILE]

        def change(folder: Path, rng: random.Random = rng, names: list[str] = names) -> str:
            return mutate_json_file(rng, folder / rng.choice(names))

        attack("run", place, change, rng)


def test_files_broken_and_swapped(attack: Any, folders: dict[str, Path], tries: Iterator[random.Random]) -> None:
    for rng in tries:
        place = rng.choice(["", "checkpoint-6"])
        names = [ADAPTER_CONFIG, *WEIGHTS, *([COMPLETE_FILE] if place else [RUN_FILE])]

        def change(folder: Path, rng: random.Random = rng, names: list[str] = names) -> str:
            file = folder / rng.choice(names)
            if rng.random() < 0.3 and file.name in WEIGHTS:
                shutil.copyfile(folders["other"] / file.name, file)
                return f"{file.name} of another run"
            return break_file(rng, file)

        attack("run", place, change, rng)


def test_stock_peft_and_resealed_adapters_never_trace_back(
    folders: dict[str, Path], tmp_path: Path, tries: Iterator[random.Random], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing says what these should hold: any result is right, but for a traceback, a hang or NaN."""
    for rng in tries:
        kind = rng.choice(["stock", "run"])
        (tmp_path / "made").mkdir(exist_ok=True)
        copy = fresh_copy(folders[kind], tmp_path / "made" / "run")
        if rng.random() < 0.5:
            what = mutate_json_file(rng, copy / ADAPTER_CONFIG)
        else:
            what = _change_tensors(rng, copy / rng.choice([n for n in WEIGHTS if (copy / n).is_file()]))
        if kind == "run":
            seal_run(copy, json.loads((copy / RUN_FILE).read_text()))
        reader = rng.choice([*readers(copy, copy), "logits"])
        code, made = result(copy, reader, tmp_path / "made" / "out", capsys)
        if reader == "logits" and code == 0:
            assert torch.frombuffer(bytearray(made), dtype=torch.float32).isfinite().all(), what


def _change_tensors(rng: random.Random, file: Path) -> str:
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    kind = rng.choice(["nan", "inf", "huge", "shape", "dtype", "missing", "name", "empty", "scalar"])
    value = tensors.pop(key)
    if kind in ("nan", "inf", "huge") and value.is_floating_point():
        value.view(-1)[rng.randrange(value.numel())] = {"nan": float("nan"), "inf": float("inf"), "huge": 1e4}[kind]
    elif kind == "shape":
        value = value.reshape(-1)[: max(1, value.numel() // 2)].clone()
    elif kind == "dtype":
        value = value.to(rng.choice([torch.int32, torch.bool, torch.float16]))
    elif kind == "empty":
        value = value[:0].clone()
    elif kind == "scalar":
        value = torch.tensor(1.0)
    if kind != "missing":
        tensors[f"{key}x" if kind == "name" else key] = value
    save_file(tensors, str(file))
    return f"{file.name}: {key}: {kind}"


def test_export_files_made_wrong(
    folders: dict[str, Path], tmp_path: Path, tries: Iterator[random.Random], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.safetensors"
    assert main(["export", str(folders["run"]), "--format", "sparse", "--out", str(whole)]) == 0
    assert main(["export", str(whole), "--format", "dense", "--out", str(tmp_path / "dense")]) == 0
    expected = weights(tmp_path / "dense")
    file, out = tmp_path / "file.safetensors", tmp_path / "out"
    for rng in tries:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        shutil.copyfile(whole, file)
        what = break_file(rng, file)
        words = ["export", str(file), "--format", "dense", "--out", str(out)]
        code = outcome(lambda words=words: main(words), capsys).code
        assert code == 2 or weights(out) == expected, what
        shutil.rmtree(out, ignore_errors=True)


def test_a_catastrophic_pattern_is_never_evaluated(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = logits(folders["stock"])
    copy = fresh_copy(folders["stock"], tmp_path / "stock")
    config = json.loads((copy / ADAPTER_CONFIG).read_text())
    bomb = {"target_modules": "(.*.*.*.*.*.*.*.*)+x", "exclude_modules": "(a|a)*$", "layers_pattern": "(.+)+y"}
    (copy / ADAPTER_CONFIG).write_text(json.dumps({**config, **bomb}))
    assert torch.equal(logits(copy), expected)
    (copy / ADAPTER_CONFIG).write_text(json.dumps({**config, "rank_pattern": {"(.*.*.*)+x": 4}}))
    with pytest.raises(UserError, match="not a plain name"):
        logits(copy)
