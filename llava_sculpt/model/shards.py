"""Checkpoint folders too large for memory: tensors read one at a time, shards written one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava_sculpt.errors import UserError
from llava_sculpt.records import write_json

INDEX_FILE = "model.safetensors.index.json"
# What a model folder holds beside its weights and config.json, as far as transformers, vLLM or the original read it.
SIDE_FILES = (
    "generation_config.json preprocessor_config.json processor_config.json chat_template.json chat_template.jinja "
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json"
).split()
_PICKLED_INDEX = "pytorch_model.bin.index.json"
SHARD_BYTES = 5 * 10**9
_PROGRESS_FILE = "progress.json"
_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 1 << 16

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
        load: returns the tensor, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: missing or not a JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no config.json: not a model folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The model weight files of a checkpoint folder, sorted by name: safetensors, or else PyTorch's .bin."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def fingerprint(whole: Iterable[Path], sampled: Iterable[Path]) -> str:
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


def check_shards(folder: Path) -> list[str]:
    """What is wrong with the weight files of a folder: none, named in the index but missing, truncated."""
    files = weight_files(folder)
    problems = [] if files else [f"{folder}: no model*.safetensors weights"]
    index = folder / (_PICKLED_INDEX if files and files[0].suffix == ".bin" else INDEX_FILE)
    if index.is_file():
        problems += _missing_shards(index, {file.name for file in files})
    for file in files:
        try:
            stored_tensors(file)
        except UserError as error:
            problems += error.problems
    return problems


def _missing_shards(index: Path, names: set[str]) -> list[str]:
    try:
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [f"{index}: not a weight index ({error})"]
    return [f"{index.parent / name}: missing, and {index.name} names it" for name in sorted(wanted - names)]


def stored_tensors(file: Path) -> list[Stored]:
    """Every tensor of one weight file (safetensors, or PyTorch's zip format), without reading its values.

    Raises:
        UserError: missing, truncated, damaged, or a data type no LLaVA checkpoint has.
    """
    if file.suffix == ".bin":
        return [
            Stored(name, tuple(tensor.shape), tensor.dtype, _LoadPickled(file, name))
            for name, tensor in _mapped_pickle(file).items()
        ]
    try:
        with safe_open(str(file), framework="pt") as opened:
            found = []
            for name in opened.keys():  # noqa: SIM118  # not a dict
                view = opened.get_slice(name)
                code = view.get_dtype()
                if code not in _DTYPES:
                    raise UserError(f"{file}: {name} is of type {code}; a quantised checkpoint cannot be used here")
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


@dataclass(frozen=True)
class _LoadPickled:
    file: Path
    name: str

    def __call__(self) -> torch.Tensor:
        return _mapped_pickle(self.file)[self.name].clone()


def _mapped_pickle(file: Path) -> dict[str, torch.Tensor]:
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
        raise UserError(f"{file}: damaged, or holds more than tensors ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file}: not a dictionary of tensors")
    return content


def write_safetensors(file: Path, tensors: Sequence[Stored], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time, under another name first: it is whole or not there.

    (The library's `save_file` takes all tensors at once: the whole shard in memory.)

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
            stream.write(values.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    aside.replace(file)


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """`write_safetensors` of tensors that are in memory."""
    stored = [Stored(name, tuple(value.shape), value.dtype, lambda v=value: v) for name, value in tensors.items()]  # type: ignore[misc]
    write_safetensors(file, stored, metadata)


def in_shards(tensors: Sequence[Stored], limit: int = SHARD_BYTES) -> dict[str, list[Stored]]:
    """Share tensors out, in their order, over files of at most `limit` bytes (one larger tensor fills one alone)."""
    shards: list[list[Stored]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_folder(
    out: Path,
    files: Mapping[str, Sequence[Stored]],
    finish: Callable[[Path], None],
    resume: Mapping[str, Any] | None = None,
) -> None:
    """Write the weight files of a new checkpoint folder, with their index, and publish it in one rename.

    It is built in a hidden folder beside `out`, so that what a kill leaves cannot be taken for a model.

    Args:
        files: what goes into which file; the index covers those named as model weights (`model*.safetensors`), others
            and those in subfolders stand beside them.
        finish: called with the hidden folder at the end, to write config.json and the other small files.
        resume: identity of this job. Files that a killed job with the same identity has finished are kept. Without
            it the job begins anew, and a failure leaves nothing.

    Raises:
        UserError: `out` is not an empty folder, or the disk is too full, or fills up.
    """
    aside = out.parent / f".{out.name}.partial"
    progress = aside / _PROGRESS_FILE
    _check_empty(out)
    if aside.exists() and (resume is None or not progress.is_file() or json.loads(progress.read_text()) != resume):
        shutil.rmtree(aside)
    done = {name for name, tensors in files.items() if _holds(aside / name, tensors)}
    todo = {name: tensors for name, tensors in files.items() if name not in done}
    try:
        _check_space(out, sum(tensor.nbytes for tensors in todo.values() for tensor in tensors))
        aside.mkdir(exist_ok=True)
        if resume is not None:
            write_json(progress, resume)
            if done:
                print(f"{out}: continuing, {len(done)} of {len(files)} files are done", file=sys.stderr)
        for name, tensors in todo.items():
            (aside / name).parent.mkdir(exist_ok=True)
            write_safetensors(aside / name, tensors)
        _write_index(aside, {name: tensors for name, tensors in files.items() if fnmatch(name, "model*.safetensors")})
        finish(aside)
        progress.unlink(missing_ok=True)
        aside.replace(out)
    except BaseException as error:
        if resume is None:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            kept = "" if resume is None else "; the same command continues with what is not done yet"
            raise UserError(f"{out}: could not be written: {error}{kept}") from error
        raise


def publish_with(out: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a hidden folder, then publish it as `out` in one rename.

    Raises:
        UserError: `out` is not an empty folder, or could not be written; nothing is left behind.
    """
    _check_empty(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        aside.chmod(0o755)
        write(aside)
        aside.replace(out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{out}: could not be written: {error}") from error
        raise


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another one for the output")


def _holds(file: Path, tensors: Sequence[Stored]) -> bool:
    if not file.is_file():
        return False
    try:
        found = {(t.name, t.shape, t.dtype) for t in stored_tensors(file)}
    except UserError:
        return False
    return found == {(t.name, t.shape, t.dtype) for t in tensors}


def _check_space(out: Path, needed: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on that disk; make room or choose "
            "another place"
        )


def _write_index(folder: Path, files: Mapping[str, Sequence[Stored]]) -> None:
    if len(files) == 1:  # a single file needs none
        return
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_files(source: Path, target: Path, names: Iterable[str] = SIDE_FILES) -> None:
    """Copy those of `names` that are in `source`."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
