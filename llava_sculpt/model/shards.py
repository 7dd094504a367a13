"""Checkpoint folders too large for memory: tensors read one at a time, shards written one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava_sculpt.errors import UserError
from llava_sculpt.records import write_json

INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor on disk or to be written there: its name, shape and dtype are known, its values come when asked for.

    Attributes:
        name: name in the file.
        load: returns the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored_tensors(file: Path) -> list[Stored]:
    """Every tensor of one safetensors file, in the order of its header.

    Raises:
        UserError: missing, truncated, damaged, or a data type no LLaVA checkpoint has.
    """
    try:
        with safe_open(str(file), framework="pt") as opened:
            # Names are sorted; neighbours in a file share pages of the disk cache.
            views = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118  # not a dict
            found = []
            for name, view in views:
                code = view.get_dtype()
                if code not in _DTYPES:
                    raise UserError(f"{file}: {name} is of type {code}; a quantised checkpoint cannot be rewritten")
                found.append(Stored(name, tuple(view.get_shape()), _DTYPES[code], _Load(file, name)))
            return found
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error}); copy or download it again") from error


@dataclass(frozen=True)
class _Load:
    file: Path
    name: str

    def __call__(self) -> torch.Tensor:
        # Opened anew each time: a mapping kept open would count every page read so far as this process's memory.
        with safe_open(str(self.file), framework="pt") as opened:
            return opened.get_tensor(self.name)


def write_safetensors(file: Path, tensors: Sequence[Stored], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time, under another name first: it is whole or not there.

    (The library's `save_file` takes all tensors at once and copies them: twice the shard in memory.)

    Raises:
        ValueError: a tensor that is not what its shape and dtype say.
        OSError: disk full, no permission.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # Wider types first, as the library does: every tensor then lies at a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    offset = 0
    for tensor in ordered:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    aside = file.with_name(f".{file.name}.writing")
    with aside.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered:
            values = tensor.load()
            if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name}: {values.dtype} {tuple(values.shape)}, not as announced")
            stream.write(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    aside.replace(file)


def write_index(folder: Path, files: Mapping[str, Sequence[Stored]]) -> None:
    """Write the index that says which shard holds which tensor; a single file needs none."""
    if len(files) == 1:
        return
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_output_folder(out: Path, needed_bytes: int) -> None:
    """Refuse an output folder that holds something, or a disk that is too full, before anything is written.

    Raises:
        UserError: not empty, not a folder, not writable, or less than `needed_bytes` free.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another one for the output")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    if free < needed_bytes:
        raise UserError(
            f"{out}: needs {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on that disk; make room or "
            "choose another place"
        )


def aside_of(out: Path) -> Path:
    """The hidden folder beside `out` in which it is built."""
    return out.parent / f".{out.name}.partial"


def publish_folder(aside: Path, out: Path) -> None:
    """Move the finished folder to its place in one rename (over an empty folder, if there is one)."""
    aside.replace(out)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of `names` that are in `source`."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
