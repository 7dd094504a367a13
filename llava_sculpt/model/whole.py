"""Whether what a run has written is whole: run.json and complete.json name its files with their hashes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_sculpt.model.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONNECTOR_FILE,
    MASKS_FILE,
    NON_LORA_FILE,
    PICKLED_ADAPTER,
    RUN_FILE,
)
from llava_sculpt.records import file_sha256, write_json

# What makes an adapter, in this project's layout or the original package's.
ARTIFACTS = (ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE, PICKLED_ADAPTER, NON_LORA_FILE)


def seal_run(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json, the last file of an adapter folder: `record` and, under `files`, the sha256 of what is there."""
    files = {name: file_sha256(folder / name) for name in ARTIFACTS if (folder / name).is_file()}
    write_json(folder / RUN_FILE, {**record, "files": files})


def check_files(folder: Path, recorded: Mapping[str, str | int]) -> list[str]:
    """What is wrong with the files of a folder, one message each; [] if they are as they were written.

    Args:
        recorded: sha256 (hexadecimal) by relative file name, or the size in bytes, which versions before 0.3 recorded.
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
