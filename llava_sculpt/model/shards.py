"""Weight files too large for memory: what is in them, their tensors one at a time, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from llava_sculpt.errors import UserError, first_line
from llava_sculpt.model.layout import EMBEDDING, HEAD, TOWER, is_buffer, memory_name
from llava_sculpt.records import check_regular, read_checked

INDEX_FILE = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_SAMPLED_BLOCKS = 64  # of a file
_BLOCK_BYTES = 1 << 16
_BLOCK_VALUES = 1 << 15  # of a tensor
_VALUES_PER_BLOCK = 1 << 23

DTYPES = {
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


@dataclass(frozen=True)
class Stored:
    """One tensor on disk or to be written there: its name, shape and dtype are known, its values come when asked for.

    Attributes:
        name: name in the file.
        load: returns the tensor, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The model weight files of a checkpoint folder, sorted by name: safetensors, or else PyTorch's .bin."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def model_tensors(folder: Path) -> Iterator[Stored]:
    """Every tensor of a checkpoint in Hugging Face layout, under its in-memory name."""
    for file in weight_files(folder):
        for tensor in stored_tensors(file):
            yield Stored(memory_name(tensor.name), tensor.shape, tensor.dtype, tensor.load)


def tower_tensors(folder: Path) -> Iterator[Stored]:
    """The vision weights of a CLIP folder under their in-memory names in a LLaVA.

    The folder holds a whole CLIPModel, or a CLIPVisionModel by any version of transformers.
    """
    for file in weight_files(folder):
        for tensor in stored_tensors(file):
            name = tensor.name.removeprefix("vision_model.")
            if name.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")) and not is_buffer(name):
                yield Stored(TOWER + name, tensor.shape, tensor.dtype, tensor.load)


def files_fingerprint(whole: Iterable[Path], sampled: Iterable[Path]) -> str:
    """sha256 over some files and a sample of others: equal for copies, different for other contents.

    Of each large file its name, its size and 64 evenly spaced blocks count, so that 14 GB take milliseconds.
    """
    digest = hashlib.sha256()
    for file in whole:
        digest.update(file.read_bytes())
    for file in sampled:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLED_BLOCKS):
                stream.seek(max(0, size - _BLOCK_BYTES) * index // (_SAMPLED_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def weights_fingerprint(folder: Path, rows: int | None = None) -> str:
    """sha256 over name, shape, dtype and a sample of the values of every weight, by in-memory name.

    Shards, file format, order and names on disk do not matter, nor do constants that some versions save. Of the vision
    tower the values count in half precision, because the same tower is published in both. A tensor is sampled in
    blocks of 32,768 values, its first and last among them, small ones are read whole: a 14 GB model takes a second.

    Args:
        rows: of the embedding and lm_head only as many count: what is behind them was added for `<image>` and `<pad>`.
    """
    lines = []
    for file in weight_files(folder):
        for on_disk, shape, dtype, read in _readers(file):
            name = memory_name(on_disk)
            if is_buffer(name):
                continue
            if rows is not None and name in (EMBEDDING, HEAD):
                shape = (min(rows, shape[0]), *shape[1:])
            counted = torch.float16 if name.startswith(TOWER) else dtype
            digest, size = hashlib.sha256(), torch.Size(shape).numel()
            last = max(0, size - _BLOCK_VALUES)
            blocks = 2 + size // _VALUES_PER_BLOCK if last else 1
            for index in range(blocks):
                start = last * index // max(1, blocks - 1)
                values = read(start, min(start + _BLOCK_VALUES, size)).to(counted)
                digest.update(values.view(torch.uint8).numpy().data)
            lines.append(f"{name} {shape} {counted} {digest.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


_Reader = Callable[[int, int], torch.Tensor]


def _readers(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, _Reader]]:
    """Name, shape, dtype of every tensor of a file, and what reads some of its values, from one place to another."""
    if file.suffix == ".bin":
        for name, tensor in mapped_pickle(file).items():
            flat = tensor.flatten()
            yield name, tuple(tensor.shape), tensor.dtype, lambda start, end, flat=flat: flat[start:end]  # type: ignore[misc]
        return
    with file.open("rb") as stream:
        behind = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(behind - 8))
        header.pop("__metadata__", None)
        for name, facts in header.items():
            dtype, place = DTYPES[facts["dtype"]], behind + facts["data_offsets"][0]

            def read(start: int, end: int, dtype: torch.dtype = dtype, place: int = place) -> torch.Tensor:
                stream.seek(place + start * dtype.itemsize)
                return torch.frombuffer(bytearray(stream.read((end - start) * dtype.itemsize)), dtype=dtype)

            yield name, tuple(facts["shape"]), dtype, read


def check_shards(folder: Path) -> list[str]:
    """What is wrong with the weight files of a folder: none, named in the index but missing, truncated."""
    files = weight_files(folder)
    problems = [] if files else [f"{folder}: no model*.safetensors weights"]
    index = folder / (PICKLED_INDEX if files and files[0].suffix == ".bin" else INDEX_FILE)
    wanted: set[str] = set()
    try:
        wanted = set(read_index(index).values()) if index.exists() else wanted
    except UserError as error:
        problems += error.problems
    gone = sorted(wanted - {file.name for file in files})
    problems += [f"{folder / name}: missing, and {index.name} names it" for name in gone]
    for file in files:
        try:
            stored_tensors(file)
        except UserError as error:
            problems += error.problems
    return problems


class _Index(TypedDict):
    weight_map: dict[str, str]


def read_index(file: Path) -> dict[str, str]:
    """Which weight is in which file, by names on disk.

    Raises:
        UserError: missing, or not a weight index.
    """
    return read_checked(file, _Index)["weight_map"]


def stored_tensors(file: Path) -> list[Stored]:
    """Every tensor of one weight file (safetensors, or PyTorch's zip format), without reading its values.

    Raises:
        UserError: missing, truncated, damaged, or a data type no LLaVA checkpoint has.
    """
    if file.suffix == ".bin":
        return [
            Stored(name, tuple(tensor.shape), tensor.dtype, partial(_load, file, name))
            for name, tensor in mapped_pickle(file).items()
        ]
    check_regular(file)
    try:
        with safe_open(str(file), framework="pt") as opened:
            found = []
            for name in opened.keys():  # noqa: SIM118  # not a dict
                view = opened.get_slice(name)
                code = view.get_dtype()
                if code not in DTYPES:
                    raise UserError(f"{file}: {name} is of type {code}; a quantised checkpoint cannot be used here")
                found.append(Stored(name, tuple(view.get_shape()), DTYPES[code], partial(_load, file, name)))
            return found
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error}); copy or download it again") from error


def _load(file: Path, name: str) -> torch.Tensor:
    if file.suffix == ".bin":
        return mapped_pickle(file)[name].clone()
    # Opened anew each time: a mapping kept open would count every page read so far as this process's memory.
    with safe_open(str(file), framework="pt") as opened:
        return opened.get_tensor(name)


def _plain(error: Exception) -> str:
    """The first sentence: behind it PyTorch tells how to run whatever is in the file."""
    return first_line(error).partition(". ")[0]


def mapped_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save` wrote, mapped, not read; nothing in it is executed.

    Raises:
        UserError: missing, truncated, damaged, or anything but a dictionary of tensors.
    """
    check_regular(file)
    if not file.is_file():
        raise UserError(f"{file}: missing")
    if not zipfile.is_zipfile(file):
        raise UserError(
            f"{file}: truncated, or saved before PyTorch 1.6; download it again, or load it once and save it anew"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    # torch.load reports what it cannot or may not unpickle through several exceptions.
    except Exception as error:
        raise UserError(f"{file}: damaged, or holds more than tensors ({_plain(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file}: not a dictionary of tensors")
    return content
