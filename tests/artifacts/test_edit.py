"""`llava-sculpt edit` as a user runs it, on trained adapters: what changes, what stays, what loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llava_sculpt.artifacts.edit import EDIT_FILE, settings_of
from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.cli import main
from llava_sculpt.data.collator import TrainCollator
from llava_sculpt.data.dataset import LlavaDataset
from llava_sculpt.model.files import ADAPTER_FILE, CONNECTOR_FILE
from llava_sculpt.model.lora import lora_pairs
from llava_sculpt.model.whole import check_files, read_run
from llava_sculpt.names import EDITS, METHODS
from tests.runs import Train

LANGUAGE = "model.language_model."


def cli(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llava_sculpt.cli", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def adapter(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edit") / "lora"
    assert train(folder, method="lora") == 0
    return folder


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight as the model computes with it, by in-memory name; an adapter merged in float32."""
    model: nn.Module = load_for_inference(str(folder)).model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def before(checkpoint: Path) -> dict[str, torch.Tensor]:
    return merged(checkpoint)


@pytest.fixture(scope="module")
def tuned(adapter: Path) -> dict[str, torch.Tensor]:
    return merged(adapter)


@pytest.fixture(scope="module")
def adapted(adapter: Path) -> set[str]:
    pairs = lora_pairs(load_for_inference(str(adapter)).model)
    return {f"{pair.name.removeprefix('base_model.model.')}.weight" for pair in pairs}


def assert_rest(
    edited: dict[str, torch.Tensor], before: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], adapted: set[str]
) -> None:
    """Outside the adapted matrices: the connector as trained, everything else as in the base."""
    assert edited.keys() == before.keys()
    for name in edited.keys() - adapted:
        assert torch.equal(edited[name], (tuned if "projector" in name else before)[name]), name
    assert any(not torch.equal(tuned[name], before[name]) for name in before if "projector" in name)


def test_post_prune(adapter: Path, tmp_path: Path) -> None:
    done = cli("edit", "post_prune", "--adapter", adapter, "--out", tmp_path / "pruned", "--density", "0.2")
    assert done.returncode == 0, done.stderr
    trained, pruned = (load_file(folder / ADAPTER_FILE) for folder in (adapter, tmp_path / "pruned"))
    assert trained.keys() == pruned.keys()
    for key, value in pruned.items():
        kept = value != 0
        assert int(kept.sum()) == value.numel() // 5
        assert torch.equal(value[kept], trained[key][kept])
        assert trained[key][~kept].abs().max() <= value[kept].abs().min()
    assert (tmp_path / "pruned" / CONNECTOR_FILE).read_bytes() == (adapter / CONNECTOR_FILE).read_bytes()
    run = read_run(tmp_path / "pruned")
    assert run == {**read_run(adapter), "files": run["files"]} and check_files(tmp_path / "pruned", run["files"]) == []
    record = json.loads((tmp_path / "pruned" / EDIT_FILE).read_text())
    assert (record["method"], record["settings"]) == ("post_prune", {"density": 0.2})
    assert {key: float(value.sum()) for key, value in pruned.items()} == {
        key: float(parameter.sum())
        for pair in lora_pairs(load_for_inference(str(tmp_path / "pruned")).model)
        for key, parameter in pair.parameters()
    }


def test_post_prune_leaves_the_connectors_lora(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", method="lora", connector="lora", max_steps=3) == 0
    assert main(["edit", "post_prune", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "pruned")]) == 0
    trained, pruned = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("run", "pruned"))
    for key in trained:
        assert torch.equal(trained[key], pruned[key]) == ("multi_modal_projector" in key)


def test_dare(adapter: Path, tmp_path: Path, before: dict, tuned: dict, adapted: set[str]) -> None:
    done = cli("edit", "dare", "--adapter", adapter, "--out", tmp_path / "dare", "--drop", "0.75", "--seed", "3")
    assert done.returncode == 0, done.stderr
    edited = merged(tmp_path / "dare")
    assert_rest(edited, before, tuned, adapted)
    kept_entries = total = 0
    for name in adapted:
        kept = edited[name] != before[name]
        assert torch.allclose((edited[name] - before[name])[kept], 4 * (tuned[name] - before[name])[kept], atol=1e-6)
        kept_entries, total = kept_entries + int(kept.sum()), total + kept.numel()
    assert kept_entries / total == pytest.approx(0.25, abs=0.02)
    for seed, same in ((3, True), (4, False)):
        out = tmp_path / f"seed{seed}"
        words = ["edit", "dare", "--adapter", adapter, "--out", out, "--drop", 0.75, "--seed", seed]
        assert main([str(word) for word in words]) == 0
        files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "dare", out)]
        assert (files[0] == files[1]) == same


def test_dare_that_drops_nothing_is_the_merged_adapter(adapter: Path, tmp_path: Path, tuned: dict) -> None:
    assert main(["edit", "dare", "--adapter", str(adapter), "--out", str(tmp_path / "out"), "--drop", "0"]) == 0
    edited = merged(tmp_path / "out")
    assert all(torch.allclose(edited[name], tuned[name], atol=1e-6) for name in tuned)


def tailor_words(adapter: Path, out: Path, data: Path, *more: object, samples: int = 12) -> list[str]:
    words = ["edit", "model_tailor", "--adapter", adapter, "--out", out, "--data_path", data / "train.json"]
    return [str(word) for word in (*words, "--image_folder", data / "images", "--samples", samples, *more)]


def test_model_tailor(
    adapter: Path, tmp_path: Path, training_data: Path, before: dict, tuned: dict, adapted: set[str]
) -> None:
    done = cli(*tailor_words(adapter, tmp_path / "out", training_data))
    assert done.returncode == 0, done.stderr
    assert "layers.1.mlp.down_proj" in done.stdout and "% less" in done.stdout
    plain = cli(*tailor_words(adapter, tmp_path / "plain", training_data, "--no_compensation"))
    assert plain.returncode == 0, plain.stderr
    edited, uncompensated = merged(tmp_path / "out"), merged(tmp_path / "plain")
    assert_rest(edited, before, tuned, adapted)
    record = json.loads((tmp_path / "out" / EDIT_FILE).read_text())
    assert record["settings"]["samples"] == 12 and record["layers"].keys() == adapted
    for name, facts in record["layers"].items():
        kept = edited[name] != before[name]
        assert int(kept.sum()) == int(0.1 * kept.numel()) == round(facts["kept"] * kept.numel())
        assert facts["error"] < facts["plain_error"]
        changed = uncompensated[name] != before[name]
        assert torch.allclose(uncompensated[name][changed], tuned[name][changed], atol=1e-6)
        assert not torch.equal(edited[name][kept], tuned[name][kept])
    losses = [sum(facts[key] for facts in record["layers"].values()) for key in ("error", "plain_error")]
    assert losses[0] < 0.98 * losses[1]


def test_the_recorded_error_is_that_of_the_fine_tuned_models_inputs(
    adapter: Path, tmp_path: Path, training_data: Path, before: dict, tuned: dict
) -> None:
    """The whole fine-tuned model, run as usual with hooks, instead of layer by layer."""
    assert main(tailor_words(adapter, tmp_path / "out", training_data, "--no_compensation", samples=100)) == 0
    record, edited = json.loads((tmp_path / "out" / EDIT_FILE).read_text()), merged(tmp_path / "out")
    loaded = load_for_inference(str(adapter))
    dataset = LlavaDataset(
        training_data / "train.json", training_data / "images", loaded.tokenizer, loaded.preprocessor, 2048, 4
    )
    collate = TrainCollator(loaded.checkpoint.pad_token_id, loaded.checkpoint.image_token_id, 4, 16, 2048)
    squares = {name: 0.0 for name in record["layers"]}
    seen = dict.fromkeys(squares, 0)

    def watch(name: str, mask: list[torch.Tensor]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0][mask[0]].double()
            squares[name] += float((rows @ (edited[name] - tuned[name]).double().T).square().sum())
            seen[name] += len(rows)

        return hook

    mask: list[torch.Tensor] = [torch.empty(0)]
    for pair in lora_pairs(loaded.model):
        name = f"{pair.name.removeprefix('base_model.model.')}.weight"
        loaded.model.get_submodule(pair.name).register_forward_pre_hook(watch(name, mask))
    with torch.no_grad():
        for index in range(len(dataset)):
            batch = collate([dataset[index]])
            # A text-only sample gets a row for an image that is not its own.
            mask[0] = batch["attention_mask"].bool()
            if dataset[index]["pixel_values"] is None:
                mask[0][1:] = False
            loaded.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    for name, facts in record["layers"].items():
        assert facts["error"] == facts["plain_error"] == pytest.approx((squares[name] / seen[name]) ** 0.5, rel=1e-4)


def test_dora_and_connector_lora_can_be_edited(train: Train, tmp_path: Path, training_data: Path) -> None:
    assert train(tmp_path / "run", method="dora", connector="lora", max_steps=3) == 0
    whole = merged(tmp_path / "run")
    nothing = ["edit", "dare", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "dare"), "--drop", "0"]
    assert main(nothing) == 0
    assert main(tailor_words(tmp_path / "run", tmp_path / "tailor", training_data, "--keep", "1")) == 0
    for name in ("dare", "tailor"):
        edited = merged(tmp_path / name)
        assert all(torch.allclose(edited[key], whole[key], atol=1e-5) for key in whole), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["post_prune", "--density", "0"], "density: must be in (0, 1]"),
        (["dare", "--drop", "1"], "drop: must be in [0, 1)"),
        (["model_tailor", "--keep", "0", "--data_path", "x", "--image_folder", "x"], "keep: must be in (0, 1]"),
        (["model_tailor", "--data_path", "nowhere.json", "--image_folder", "x"], "nowhere.json"),
        (["dare", "--base", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["edit", words[0], "--adapter", str(adapter), "--out", str(tmp_path / "out"), *words[1:]]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_edit_has_the_settings_of_its_row() -> None:
    for name in EDITS:
        given = dict.fromkeys((*METHODS[name].fields, "no_such"))
        assert settings_of(name, given).keys() == set(METHODS[name].fields)


@pytest.mark.parametrize("method", EDITS)
def test_folders(
    adapter: Path, tmp_path: Path, training_data: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    data = ["--data_path", str(training_data / "train.json"), "--image_folder", str(training_data / "images")]
    more = data if method == "model_tailor" else []
    assert main(["edit", method, "--adapter", str(tmp_path), "--out", str(tmp_path / "out"), *more]) == 2
    assert "not an adapter folder" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert main(["edit", method, "--adapter", str(adapter), "--out", str(tmp_path / "mine"), *more]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
