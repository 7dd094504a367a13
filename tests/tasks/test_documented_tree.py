"""The folders that data/README.md describes are those that its commands, README.md's and the configurations name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from llava_sculpt.cli import main
from llava_sculpt.experiments.tiny_data import prepare_tiny_world
from llava_sculpt.names import TASKS

from .conftest import WRITERS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in ROOT.glob("configs/**/*.yaml") if p.parent.name not in ("grids", "values"))
DOCUMENTS = ("README.md", "data/README.md", "docs/data.md")
TINY = "data/tiny_llava"


def commands(name: str) -> list[list[str]]:
    """The arguments of every `llava-sculpt NAME` line in a code block of the documents, without its comment."""
    lines = [line for document in DOCUMENTS for line in (ROOT / document).read_text(encoding="utf-8").splitlines()]
    found = [re.match(rf"(?:\.venv/bin/)?llava-sculpt ({name} .*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


# One's own data is drawn by a command of its own, and prepared in tests/test_docs.py.
PREPARE = [arguments for arguments in commands("prepare") if arguments[1] != "own"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository root with the raw files of data/README.md, and the tiny world."""
    root = tmp_path_factory.mktemp("root")
    for name, write in WRITERS.items():
        write(root / "data" / "raw" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_sculpt.tiny.draw.ICONQA_SIZES", {"train": 3, "val": 1, "test": 1})
        patch.setattr("llava_sculpt.tiny.draw.COCO_SIZES", {"train": 3, "val": 1, "test": 1})
        patch.setattr("llava_sculpt.tiny.draw.SOURCE_SIZES", {n: {"val": 1, "test": 1} for n in TASKS})
        prepare_tiny_world(root / "data" / "tiny")
    (root / TINY).symlink_to(ROOT / TINY)
    (root / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for arguments in PREPARE:
            shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
            assert main(arguments) == 0, arguments
    return root


def test_every_data_set_has_a_documented_command(root: Path) -> None:
    assert {arguments[1] for arguments in PREPARE} == set(TASKS)
    assert all((root / "data" / name / "manifest.json").is_file() for name in TASKS)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_path_of_a_configuration_exists(root: Path, file: Path) -> None:
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    records = json.loads((root / config["data_path"]).read_text(encoding="utf-8"))
    assert records
    assert all((root / config["image_folder"] / record["image"]).is_file() for record in records)
    if "deepspeed" in config:
        assert (root / config["deepspeed"]).is_file()
    if file.parent.name == "tiny":
        assert (root / config["model_name_or_path"] / "config.json").is_file()


def test_check_data_as_documented(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(root)
    documented = commands("check-data")
    assert len(documented) == 3
    for arguments in documented:
        arguments[arguments.index("--model") + 1] = TINY
        assert main(arguments) == 0, arguments
        assert "records are sound" in capsys.readouterr().out


def test_git_ignores_what_the_documents_tell_to_create() -> None:
    created = ["data/raw/iconqa/x", "data/iconqa/train.json", "data/tiny/x", "runs/mine/x", "models/mine/x"]
    created += ["adapters/mine/x", "llava-v1.5-7b-mine-lora/x", "mine.sparse.safetensors", "mine.delta.safetensors"]
    told = subprocess.run(["git", "check-ignore", *created], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.stdout.split() == created
