"""Damaged, half-written and hostile adapters and bases, one of each kind: what is refused, and what is not followed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.artifacts.model_card import write_model_card
from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.locks import output_lock
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE, RUN_FILE
from llava_sculpt.model.load import load_base
from llava_sculpt.model.whole import check_files, check_whole
from tests.runs import Train, changed


@pytest.fixture(scope="module")
def trained(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, max_steps=8) == 0
    return changed(folder)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def base(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "base")


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, str(file), metadata={"format": "pt"})


@pytest.mark.parametrize("name", [CONNECTOR_FILE, MASKS_FILE])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_file_that_is_gone(run: Path, name: str, recorded: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where an earlier version has written run.json, without hashes."""
    record = json.loads((run / RUN_FILE).read_text())
    if not recorded:
        del record["files"]
        (run / RUN_FILE).write_text(json.dumps(record))
        check_whole(run)
    (run / name).unlink()
    for words in (["inspect", run], ["merge", run, "--out", run.with_name("out")]):
        assert main([str(word) for word in words]) == 2
        assert f"{name}: missing" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"{name}: missing"):
        load_for_inference(str(run))


def test_a_kill_in_the_final_save(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / RUN_FILE).read_text())
    (run / RUN_FILE).write_text(json.dumps({**record, "status": "running"}))
    assert main(["inspect", str(run)]) == 2
    assert "has not finished" in capsys.readouterr().err


def test_sizes_of_earlier_versions(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    assert check_files(tmp_path, {"a": 4}) == []
    assert "changed" in check_files(tmp_path, {"a": 5})[0] and "missing" in check_files(tmp_path, {"b": 1})[0]


def test_weights_that_are_no_numbers(run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    healthy = (run / ADAPTER_FILE).read_bytes()
    edit(run / ADAPTER_FILE, lambda t: t[key].fill_(float("nan")))
    assert main(["export", str(changed(run)), "--format", "sparse", "--out", str(tmp_path / "x")]) == 2
    assert key in capsys.readouterr().err
    (run / ADAPTER_FILE).write_bytes(healthy)
    changed(run)
    # 1e6 is a number, but not in half precision.
    edit(base / "model.safetensors", lambda t: t["language_model.model.norm.weight"].fill_(1e6))
    record = json.loads((run / RUN_FILE).read_text())
    record["base"]["fingerprint"] = find_base_checkpoint(str(base)).fingerprint()
    (run / RUN_FILE).write_text(json.dumps(record))
    merge = ["merge", str(run), "--base", str(base), "--out", str(tmp_path / "merged")]
    assert main([*merge, "--dtype", "fp16"]) == 2
    assert "too large for float16" in capsys.readouterr().err and not (tmp_path / "merged").exists()
    edit(base / "model.safetensors", lambda t: t["language_model.model.norm.weight"].fill_(float("inf")))
    with pytest.raises(UserError, match=r"infinite values in 1 tensors, such as model\.language_model\.norm"):
        load_base(find_base_checkpoint(str(base)), torch.float32)


def test_a_base_that_lacks_a_weight(base: Path) -> None:
    edit(base / "model.safetensors", lambda t: t.pop("language_model.model.norm.weight"))
    with pytest.raises(UserError, match=r"weight model\.language_model\.norm\.weight is missing"):
        find_base_checkpoint(str(base))


def test_one_output_one_process(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "a.safetensors"
    with output_lock(out), output_lock(file):
        assert main(["merge", str(run), "--out", str(out)]) == 2
        assert main(["export", str(run), "--format", "sparse", "--out", str(file)]) == 2
    assert capsys.readouterr().err.count("another process") == 2
    assert not out.exists() and not file.exists()


def test_planted_links_and_leftovers(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    (tmp_path / ".a.safetensors.writing").symlink_to(mine / "notes")
    (tmp_path / ".a.safetensors.abc.writing").symlink_to(mine / "notes")
    (tmp_path / ".out.partial").symlink_to(mine)
    assert main(["export", str(run), "--format", "sparse", "--out", str(tmp_path / "a.safetensors")]) == 0
    assert main(["export", str(tmp_path / "a.safetensors"), "--format", "dense", "--out", str(tmp_path / "out")]) == 0
    assert (mine / "notes").read_text() == "mine" and [f.name for f in mine.iterdir()] == ["notes"]
    assert {f.name for f in tmp_path.iterdir() if f.name.startswith(".")} <= {".a.safetensors.writing"}


def test_private_outputs_under_a_private_umask(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        file, out = tmp_path / "new" / "a.safetensors", tmp_path / "new" / "out"
        assert main(["export", str(run), "--format", "sparse", "--out", str(file)]) == 0
        assert main(["export", str(file), "--format", "dense", "--out", str(out)]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "new").rglob("*")} == {0}


def test_a_card_shows_markup_as_text(run: Path) -> None:
    record = json.loads((run / RUN_FILE).read_text())
    record["data"]["path"] = "a/<script>`|x\n# title/train.json"
    record["base"]["path"] = "b`\n```\n<img>"
    record["config"]["output_dir"] = 'c"; rm -rf x #`'
    record["config"]["seed"] = 1
    record["versions"] = {"torch": "<b>2</b>\n---"}
    (run / RUN_FILE).write_text(json.dumps(record))
    write_model_card(run, scores="a\n```\n<h1>b")
    lines = (run / "README.md").read_text().splitlines()
    body = lines[lines.index("---", 1) + 1 :]
    fence = ""
    for line in body:
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if not fence and len(ticks) >= 3:
            fence = ticks
        elif fence and line == fence:
            fence = ""
        elif not fence:
            assert "<script" not in line.replace("\\<", "") and "<b>" not in line.replace("\\<", ""), line
            assert not line.startswith("# title")
    assert not fence and "merge 'c\"; rm -rf x #`'" in "\n".join(body)


def test_settings_that_would_change_the_model_unseen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run / ADAPTER_CONFIG).read_text())
    for change, told in (
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": "8"}, "r: "),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ):
        (run / ADAPTER_CONFIG).write_text(json.dumps({**config, **change}))
        assert main(["inspect", str(changed(run))]) == 2
        assert told in capsys.readouterr().err
