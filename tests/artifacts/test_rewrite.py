"""rewrite_checkpoint: what is not changed keeps its bytes, whatever names and shards the base has on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_sculpt.artifacts import writing
from llava_sculpt.artifacts.merge import rewrite_checkpoint
from llava_sculpt.errors import UserError
from llava_sculpt.model.checkpoint import find_base_checkpoint

Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"


def in_three_shards(folder: Path) -> None:
    """Cut model.safetensors into three files with an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::3]}
        save_file(part, str(folder / name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_published(folder: Path) -> None:
    """The names on disk of llava-hf/llava-1.5-7b-hf."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {key.replace("vision_tower.", "vision_tower.vision_model.", 1): v for key, v in tensors.items()}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in renamed
    save_file(renamed, str(folder / "model.safetensors"), metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_in_memory(folder: Path) -> None:
    weights = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


@pytest.fixture(params=[None, in_three_shards, as_published, as_in_memory, pickled])
def base(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    prepare: Callable[[Path], None] | None = request.param
    if prepare is not None:
        prepare(folder)
    return folder


def test_changes_what_it_is_told_and_nothing_else(base: Path, tmp_path: Path) -> None:
    names = []

    def double_q(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        names.append(name)
        return 2 * weight if name == Q_PROJ else None

    rewrite_checkpoint(find_base_checkpoint(str(base)), tmp_path / "out", double_q)
    before = LlavaForConditionalGeneration.from_pretrained(base).state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert sorted(names) == sorted(before)
    for name in before:
        assert torch.equal(after[name], before[name] * (2 if name == Q_PROJ else 1)), name
    names = {f.name.replace("pytorch_model.bin", "model.safetensors") for f in base.iterdir()}
    added = {f.name for f in (tmp_path / "out").iterdir()} - names
    assert names <= {f.name for f in (tmp_path / "out").iterdir()} and not any("model" in name for name in added)
    assert list(tmp_path.glob(".*")) == []


def test_bytes_and_dtypes(checkpoint: Path, tmp_path: Path) -> None:
    base = find_base_checkpoint(str(checkpoint))
    rewrite_checkpoint(base, tmp_path / "same", lambda name, weight: None)
    rewrite_checkpoint(base, tmp_path / "half", lambda name, weight: None, torch.bfloat16)
    original, same, half = (
        load_file(f / "model.safetensors") for f in (checkpoint, tmp_path / "same", tmp_path / "half")
    )
    for name, weight in original.items():
        assert torch.equal(same[name].view(torch.int32), weight.view(torch.int32))
        assert torch.equal(half[name], weight.bfloat16()) and half[name].dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert find_base_checkpoint(str(tmp_path / "half")).config["text_config"] is not None


def test_refuses_a_folder_with_something_in_it_and_a_full_disk(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = find_base_checkpoint(str(checkpoint))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        rewrite_checkpoint(base, tmp_path / "out", lambda name, weight: None)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"GB are free"):
        rewrite_checkpoint(base, tmp_path / "other", lambda name, weight: None)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(checkpoint: Path, tmp_path: Path, error: BaseException) -> None:
    def fail(name: str, weight: torch.Tensor) -> None:
        if name == Q_PROJ:
            raise error

    with pytest.raises((UserError, KeyboardInterrupt)):
        rewrite_checkpoint(find_base_checkpoint(str(checkpoint)), tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_not_in_the_way(checkpoint: Path, tmp_path: Path) -> None:
    aside = tmp_path / ".out.partial"
    aside.mkdir()
    (aside / "model-00001-of-00002.safetensors").write_bytes(b"half")
    rewrite_checkpoint(find_base_checkpoint(str(checkpoint)), tmp_path / "out", lambda name, weight: None)
    assert not aside.exists() and not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
