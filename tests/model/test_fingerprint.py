"""Which base an adapter belongs to: its weights count, whatever files, names and layout they come in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sculpt.artifacts.convert import convert_checkpoint
from llava_sculpt.errors import UserError
from llava_sculpt.model import shards
from llava_sculpt.model.adapter import check_base
from llava_sculpt.model.checkpoint import BaseCheckpoint, find_base_checkpoint
from tests.artifacts.test_rewrite import as_published, in_three_shards, pickled

EMBEDDING = "language_model.model.embed_tokens.weight"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> BaseCheckpoint:
    """The checkpoint of a folder after a change of its weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return find_base_checkpoint(str(folder))


@pytest.fixture
def twin(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "twin")


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    """What `check_base` reads of a run on the checkpoint."""
    base = find_base_checkpoint(str(checkpoint))
    (tmp_path / "run").mkdir()
    record = {"path": "p", "fingerprint": base.fingerprint(), "weights": base.weights_fingerprint()}
    config = {"method": "lora", "connector": "full", "output_dir": "run", "lora_r": 4, "seed": 0}
    config |= {"model_max_length": 2048, "sculpt_density": 0.1}
    run = {"status": "finished", "base": record, "config": config, "identity": {}, "versions": {}, "steps": 1}
    run |= {"data": {"path": "d", "samples": 1, "sha256": "0"}, "global_batch_size": 1, "world_size": 1}
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    return tmp_path / "run"


def test_another_layout_is_the_same_base(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    """hf -> original -> hf, and a run on the converted original used on the hf twin."""
    convert_checkpoint(str(checkpoint), "original", tmp_path / "llava")
    convert_checkpoint(str(tmp_path / "llava"), "hf", tmp_path / "back")
    (tmp_path / "llava" / "hf_rows.safetensors").unlink()
    convert_checkpoint(str(tmp_path / "llava"), "hf", tmp_path / "theirs")  # with made-up rows for <image> and <pad>
    for name in ("back", "theirs"):
        other = find_base_checkpoint(str(tmp_path / name))
        assert other.fingerprint() != find_base_checkpoint(str(checkpoint)).fingerprint()
        check_base(adapter, other)


@pytest.mark.parametrize("prepare", [in_three_shards, as_published, pickled])
def test_other_files_are_the_same_base(adapter: Path, twin: Path, prepare: Callable[[Path], None]) -> None:
    prepare(twin)
    check_base(adapter, find_base_checkpoint(str(twin)))


@pytest.mark.parametrize(
    "name", [EMBEDDING, "language_model.lm_head.weight", "multi_modal_projector.linear_2.bias", "vision_tower"]
)
def test_one_changed_weight_is_another_base(adapter: Path, twin: Path, name: str) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        key = next(key for key in weights if key.startswith(name))
        row = weights[key].view(-1, weights[key].shape[-1])[0]
        row[-1] += 1

    with pytest.raises(UserError, match="another base"):
        check_base(adapter, changed(twin, change))


def test_rows_behind_the_vocabulary_and_a_half_tower_do_not_count(adapter: Path, twin: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[EMBEDDING][find_base_checkpoint(str(twin)).image_token_id :] = 7
        for key in weights:
            if key.startswith("vision_tower"):
                weights[key] = weights[key].half()

    check_base(adapter, changed(twin, change))


def test_large_tensors_are_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BLOCK_VALUES", 10)
    monkeypatch.setattr(shards, "_VALUES_PER_BLOCK", 300)  # of 1000 values those at 0, 247, 495, 742, 990 and behind
    whole = torch.zeros(1000)
    found = {}
    for place in (None, 0, 251, 504, 999, 300):
        tensor = whole.clone()
        if place is not None:
            tensor[place] = 1
        save_file({"x": tensor}, str(tmp_path / "model.safetensors"))
        found[place] = shards.weights_fingerprint(tmp_path)
    assert found[300] == found[None] and len(set(found.values())) == 5


def test_runs_that_recorded_only_the_files(adapter: Path, checkpoint: Path, twin: Path) -> None:
    record = json.loads((adapter / "run.json").read_text())
    del record["base"]["weights"]
    (adapter / "run.json").write_text(json.dumps(record))
    check_base(adapter, find_base_checkpoint(str(twin)))
    in_three_shards(twin)
    with pytest.raises(UserError, match="another base"):
        check_base(adapter, find_base_checkpoint(str(twin)))


def test_committed_results_are_of_the_tiny_model_that_is_here() -> None:
    base = find_base_checkpoint(str(Path(__file__).parents[2] / "data" / "tiny_llava")).fingerprint()
    results = list((Path(__file__).parents[2] / "results" / "tiny" / "runs").glob("*.json"))
    assert results and all(json.loads(file.read_text())["base"] == base for file in results)
