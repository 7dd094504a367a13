"""Whether what a run has written is whole: run.json and complete.json name its files with their hashes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from typing_extensions import NotRequired, TypedDict

from llava_sculpt.errors import UserError
from llava_sculpt.model.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    COMPLETE_FILE,
    CONNECTOR_FILE,
    MASKS_FILE,
    NON_LORA_FILE,
    PICKLED_ADAPTER,
    RUN_FILE,
)
from llava_sculpt.names import LORASCULPT, METHODS
from llava_sculpt.records import checked, file_sha256, read_checked, read_object, write_json

# What makes an adapter, in this project's layout or the original package's.
ARTIFACTS = (ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE, PICKLED_ADAPTER, NON_LORA_FILE)

_Count = Annotated[int, Ge(1)]


class _Base(TypedDict):
    path: str
    fingerprint: str
    weights: NotRequired[str]
    architecture: NotRequired[str]


class _Data(TypedDict):
    path: str
    samples: int
    sha256: str


class _Config(TypedDict):
    method: str
    connector: Literal["full", "frozen", "lora", "sculpt"]
    output_dir: str
    lora_r: int
    seed: int
    model_max_length: _Count
    sculpt_density: float
    push_to_hub: NotRequired[bool]
    hub_model_id: NotRequired[str | None]
    hub_revision: NotRequired[str | None]


class _Run(TypedDict):
    """What is read of run.json; a run of an earlier version may lack what is NotRequired."""

    status: Literal["running", "finished"]
    identity: dict[str, Any]
    config: _Config
    base: _Base
    data: _Data
    steps: int
    global_batch_size: int
    world_size: int
    versions: dict[str, str]
    command: NotRequired[str]
    engine: NotRequired[str]
    train_seconds: NotRequired[float]
    peak_memory_bytes: NotRequired[int]
    files: NotRequired[dict[str, str]]


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a folder, {} where there is none.

    Raises:
        UserError: it is not what this project writes; every field that is missing or wrong.
    """
    file = folder / RUN_FILE
    if not os.path.lexists(file):
        return {}
    run = read_object(file)
    check_run(run, file)
    return run


def check_run(run: dict[str, Any], source: Path) -> None:
    """The content of a run.json, as `read_run`."""
    method = checked(run, _Run, source)["config"]["method"]
    if method not in METHODS:
        raise UserError(f"{source}: config.method: {method!r} is no method that this version knows")


def check_whole(folder: Path) -> None:
    """Refuse an adapter folder of a run that has not finished, or whose files are not those that were written.

    A folder without run.json and complete.json, which stock PEFT has written, says nothing about itself and is taken
    as it is. Earlier versions recorded no hashes of a run's files: then it is checked which files have to be there.

    Raises:
        UserError: everything that is wrong with it.
    """
    run = read_run(folder)
    if run:
        if run["status"] != "finished":
            raise UserError(f"{folder}: this run has not finished: run the same training command again to continue it")
        recorded = run.get("files")
        problems = _lacking(folder, run["config"]) if recorded is None else check_files(folder, recorded)
    elif os.path.lexists(folder / COMPLETE_FILE):
        recorded = {k: v for k, v in read_complete(folder).items() if k in ARTIFACTS}
        problems = check_files(folder, recorded)
    else:
        return
    if recorded is not None:
        added = [name for name in ARTIFACTS if name not in recorded and os.path.lexists(folder / name)]
        problems += [f"{folder / name}: was not there when the folder was written" for name in added]
    if problems:
        raise UserError(problems)


def read_complete(checkpoint: Path) -> dict[str, str | int]:
    """complete.json of a checkpoint: what `check_files` takes.

    Raises:
        UserError: missing, or something else.
    """
    return read_checked(checkpoint / COMPLETE_FILE, dict[str, str | int])


def _lacking(folder: Path, config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config["connector"] == "full" and not any((folder / n).is_file() for n in (CONNECTOR_FILE, NON_LORA_FILE)):
        problems.append(f"{folder / CONNECTOR_FILE}: missing, and the connector was trained")
    if config["method"] == LORASCULPT and config["sculpt_density"] < 1 and not (folder / MASKS_FILE).is_file():
        problems.append(f"{folder / MASKS_FILE}: missing, and the adapter was pruned")
    return problems


def seal_run(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json, the last file of an adapter folder: `record` and, under `files`, the sha256 of what is there."""
    files = {name: file_sha256(folder / name) for name in ARTIFACTS if (folder / name).is_file()}
    write_json(folder / RUN_FILE, {**record, "files": files})


def copy_run(source: Path, folder: Path, **more: Any) -> None:
    """Write the run.json of an adapter, if it has one, beside what was made of it, with the hashes of that."""
    run = read_run(source)
    if run:
        seal_run(folder, {**run, **more})


def check_files(folder: Path, recorded: Mapping[str, str | int]) -> list[str]:
    """What is wrong with the files of a folder, one message each; [] if they are as they were written.

    Args:
        recorded: sha256 (hexadecimal) by relative file name, or the size in bytes, which versions before 0.2 recorded.
    """
    problems = []
    for name, expected in recorded.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: missing, and was there when the folder was written")
            continue
        try:
            found = file.stat().st_size if isinstance(expected, int) else file_sha256(file)
        except OSError as error:
            problems.append(f"{file}: cannot be read: {error.strerror}")
            continue
        if found != expected:
            problems.append(f"{file}: damaged or changed since it was written")
    return problems
