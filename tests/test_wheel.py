"""`pip install .`: the wheel brings what the commands need, so that they work in any folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import llava_sculpt
from llava_sculpt.artifacts.open import open_checkpoint
from llava_sculpt.config_reader import parse_config
from llava_sculpt.experiments.grid import read_grid
from llava_sculpt.experiments.tiny_data import find_data
from llava_sculpt.names import SCALES, SHIPPED, shipped

ROOT = Path(__file__).parents[1]
CARRIED = ("llava_sculpt", "configs", "data/tiny_llava")


def tracked(*places: str) -> list[str]:
    command = ["git", "ls-files", "--", *places]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files: a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked("pyproject.toml", "README.md", "LICENSE", *CARRIED):
        copy = folder / "src" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(os.readlink(ROOT / name)) if (ROOT / name).is_symlink() else os.link(ROOT / name, copy)
    command = "-m pip wheel --no-deps --no-build-isolation --no-index --quiet --wheel-dir"
    subprocess.run([sys.executable, *command.split(), str(folder), str(folder / "src")], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_everything(wheel: Path) -> None:
    names = [name for name in tracked(*CARRIED) if not (ROOT / name).is_symlink()]
    inside = {name if name.startswith("llava_sculpt/") else f"llava_sculpt/shipped/{name}" for name in names}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == inside
    assert wheel.stat().st_size < 6e6


def test_commands_of_the_wheel_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    for arguments, said in (
        (["--version"], f"llava-sculpt {llava_sculpt.__version__}\n"),
        (["experiment", "table1", "--scale", "tiny", "--dry_run"], "43 runs, 0 of them done"),
        (["ask", "data/tiny_llava", "Is there a dog?"], "\n"),
    ):
        command = [sys.executable, "-m", "llava_sculpt.cli", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and said in done.stdout, done.stderr
    assert not any((tmp_path / "empty").iterdir())


def test_what_is_here_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped("configs/zero2.json") == str(SHIPPED / "configs/zero2.json")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/zero2.json").write_text("{}")
    assert shipped("configs/zero2.json") == "configs/zero2.json"
    assert shipped("configs/zero3.json") == str(SHIPPED / "configs/zero3.json")
    for other in (
        "data",
        "data/iconqa",
        "configs/mine.yaml",
        "configs/../data/tiny_llava",
        "../configs",
        "",
        "/configs",
    ):
        assert shipped(other) == other


def test_names_of_the_repository_work_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded names, and so what a run is, do not depend on the folder that the command is given in."""
    there = [[run.name for run in read_grid("table1", scale).runs] for scale in SCALES]
    monkeypatch.chdir(tmp_path)
    assert [[run.name for run in read_grid("table1", scale).runs] for scale in SCALES] == there
    config = parse_config(
        ["--config", "configs/iconqa_sculpt.yaml", "--model_name_or_path", "data/tiny_llava"], elsewhere=True
    )
    assert config.training.deepspeed == "configs/zero2.json"
    assert config.model.model_name_or_path == "data/tiny_llava"
    assert open_checkpoint("data/tiny_llava").path == SHIPPED / "data/tiny_llava"
    for name in ("data/tiny_llava", str(SHIPPED / "data/tiny_llava")):
        assert find_data(name, generate=False) == Path("data/tiny")
    assert find_data("data/other", generate=False) == Path("data")


def test_one_version() -> None:
    said = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None and said[1] == llava_sculpt.__version__
    assert newest is not None and newest[1] in (llava_sculpt.__version__, "Unreleased")
