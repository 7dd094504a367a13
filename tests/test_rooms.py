"""Imports point one way: every room knows only the rooms below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llava_sculpt"
BELOW = {
    "sculpt": set(),
    "data": {"errors", "progress", "records"},
    "methods": {"sculpt"},
    "model": {"errors", "locks", "names", "progress", "records", "data", "sculpt"},
    "artifacts": {"errors", "locks", "names", "ranges", "progress", "records", "data", "sculpt", "methods", "model"},
    "memory": {"errors", "names", "ranges", "records", "config", "config_reader", "data", "model"},
    "tasks": {"errors", "locks", "names", "progress", "records", "data"},
    "evaluation": {"errors", "locks", "names", "progress", "records", "data", "model", "artifacts", "tasks"},
    "train": {
        "errors",
        "locks",
        "names",
        "progress",
        "records",
        "config",
        "config_reader",
        "data",
        "sculpt",
        "methods",
        "model",
        "artifacts",
        "memory",
    },
    "llava_patch": {"errors", "names", "config", "train"},
    "tiny": {"errors", "locks", "records", "data", "tasks"},
    "experiments": {
        "errors",
        "locks",
        "names",
        "ranges",
        "progress",
        "records",
        "yaml_reader",
        "config",
        "config_reader",
        "data",
        "model",
        "artifacts",
        "memory",
        "tasks",
        "evaluation",
        "train",
        "tiny",
    },
}


def rooms_used(file: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("llava_sculpt.")}


@pytest.mark.parametrize("room", BELOW)
def test_room_knows_only_what_is_below(room: str) -> None:
    used = set().union(*(rooms_used(file) for file in (PACKAGE / room).rglob("*.py")))
    assert used - {room} <= BELOW[room]


def test_every_room_is_listed() -> None:
    assert {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()} == set(BELOW)


def test_the_tiny_world_does_not_know_its_pretraining() -> None:
    for file in (PACKAGE / "tiny").glob("*.py"):
        assert "tiny.pretraining" not in file.read_text(encoding="utf-8"), file


def test_deepspeed_is_known_to_one_module_and_the_method_to_torch_alone() -> None:
    for file in PACKAGE.rglob("*.py"):
        imported = [
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        if any(name.split(".")[0] == "deepspeed" for name in imported):
            assert file == PACKAGE / "train" / "zero.py"
        if file.parent.name == "sculpt":
            assert not any(name.split(".")[0] in ("transformers", "peft", "accelerate") for name in imported)


# The same thing seen from two rooms: a data set and its scorer; LLaVA's train.py and trainer, here and patched.
SHARED_NAMES = {"__init__.py", "gqa.py", "train.py", "trainer.py"}


def test_no_two_modules_share_a_name() -> None:
    names = [file.name for file in PACKAGE.rglob("*.py")]
    assert {name for name in names if names.count(name) > 1} == SHARED_NAMES
