"""The tiny world's data, generated in the real data sets' raw formats and prepared by the real preparation code."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

import llava_sculpt.tasks
import llava_sculpt.tiny
from llava_sculpt.artifacts.merge import MERGE_FILE
from llava_sculpt.errors import UserError
from llava_sculpt.locks import folder_lock
from llava_sculpt.model.adapter import base_of, find_upwards
from llava_sculpt.model.files import ADAPTER_CONFIG
from llava_sculpt.names import DATA, PAPER_TASKS, SHIPPED, TASKS, shipped
from llava_sculpt.records import read_checked, read_json, write_json
from llava_sculpt.tasks import prepare_benchmark
from llava_sculpt.tiny.world import write_raw_world

_MARKER = "world.json"


class _Base(TypedDict):
    path: str


class _Merged(TypedDict):
    base: _Base


def prepare_tiny_world(root: Path, seed: int = 0) -> None:
    """Write `root`/raw/NAME and `root`/NAME for all six tasks, unless they are there and current (about 30 s).

    Another process that does is waited for.
    """
    current = {"seed": seed, "code": _code_hash()}
    if _holds(root, current):
        return
    with folder_lock(root, wait=True):
        if _holds(root, current):
            return
        print(f"generating the tiny world in {root}", flush=True)
        try:
            (root / _MARKER).unlink(missing_ok=True)
            write_raw_world(root, seed)
            for name in PAPER_TASKS:
                prepare_benchmark(name, root / "raw" / name, root / name, **TASKS[name].tiny_options, overwrite=True)
            write_json(root / _MARKER, current)
        except OSError as error:
            raise UserError(f"{root}: cannot write the tiny world: {error}") from error


def _holds(root: Path, world: dict[str, Any]) -> bool:
    try:
        return bool(read_json(root / _MARKER) == world)
    except UserError:  # not there, or damaged: made anew
        return False


def find_data(model: str, base: str | None = None, *, generate: bool = True) -> Path:
    """The folder of the prepared data sets for a model: `tiny` beside a base in `data/tiny_llava`, else `data`.

    Args:
        model: base model, adapter folder or merged model.
        base: base checkpoint, if not the one the adapter names.
        generate: make the tiny world if need be.
    """
    folder, name = Path(model), model
    if (folder / ADAPTER_CONFIG).is_file():
        name = base_of(folder, base)
    elif (folder / MERGE_FILE).is_file():
        name = find_upwards(read_checked(folder / MERGE_FILE, _Merged)["base"]["path"], folder)
    place = Path(name)
    if not os.path.isdir(shipped(name)) or place.absolute().parts[-2:] != ("data", "tiny_llava"):
        return DATA["paper"]
    root = DATA["tiny"] if place.is_relative_to(SHIPPED) else place.parent / "tiny"  # never inside the package
    if generate:
        prepare_tiny_world(root)
    return root


def _code_hash() -> str:
    """sha256 of the code and assets that make the data: other code, other data."""
    digest = hashlib.sha256()
    for package in (llava_sculpt.tiny, llava_sculpt.tasks):
        for file in sorted(Path(package.__path__[0]).rglob("*")):
            if file.suffix in (".py", ".png") and "pretraining" not in file.parts:
                digest.update(file.read_bytes())
    return digest.hexdigest()
