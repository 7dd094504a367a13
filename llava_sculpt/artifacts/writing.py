"""Writing artifacts: weight files one tensor at a time, folders that are published in one rename."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from llava_sculpt.errors import UserError
from llava_sculpt.locks import output_lock, remove_leftovers, tidy
from llava_sculpt.model.files import is_finite
from llava_sculpt.model.shards import DTYPES, INDEX_FILE, Stored, stored_tensors
from llava_sculpt.records import check_regular, read_json, write_json, written_aside

# What a model folder holds beside its weights and config.json, as far as transformers or vLLM read it, and those of
# LLaVA from which its processor is made.
SIDE_FILES = (
    "generation_config.json preprocessor_config.json processor_config.json chat_template.json chat_template.jinja "
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt"
).split()
LLAVA_FILES = ("generation_config.json", "preprocessor_config.json", "tokenizer.model")
SHARD_BYTES = 5 * 10**9
_PROGRESS_FILE = "progress.json"
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(file: Path, tensors: Sequence[Stored], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time, under another name first: it is whole or not there.

    (The library's `save_file` takes all tensors at once: the whole shard in memory.)

    Raises:
        UserError: a value that is NaN or infinite.
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
    with written_aside(file) as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered:
            values = tensor.load()
            if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name}: {values.dtype} {tuple(values.shape)}, not as announced")
            if not is_finite(values):
                raise UserError(
                    f"{file}: {tensor.name}: NaN or infinite values, not written: the source is damaged, or has "
                    f"values too large for {str(tensor.dtype).removeprefix('torch.')}"
                )
            stream.write(values.detach().contiguous().flatten().view(torch.uint8).numpy().data)


def in_memory(tensors: Mapping[str, torch.Tensor]) -> list[Stored]:
    """Tensors that need no loading."""
    return [Stored(name, tuple(value.shape), value.dtype, lambda v=value: v) for name, value in tensors.items()]  # type: ignore[misc]


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """`write_safetensors` of tensors that are in memory."""
    write_safetensors(file, in_memory(tensors))


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


def write_export(file: Path, tensors: Sequence[Stored], metadata: dict[str, str]) -> None:
    """`write_safetensors` for a new file that the user has named.

    Raises:
        UserError: it exists, another process is writing it, or it could not be written.
    """
    with output_lock(file):
        check_no_file(file)
        try:
            write_safetensors(file, tensors, metadata)
        except OSError as error:
            raise UserError(f"{file}: could not be written: {error}") from error


def check_no_file(file: Path) -> None:
    """Refuse to write over something.

    Raises:
        UserError: `file` is there, if only as a link to nowhere.
    """
    if os.path.lexists(file):
        tidy(file)
        raise UserError(f"{file}: exists; choose another name")


def check_new(out: Path) -> None:
    """Refuse an output that would overwrite something.

    Raises:
        UserError: `out` is there and is not an empty folder.
    """
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            tidy(out)
            raise UserError(f"{out}: exists and is not an empty folder; choose another one for the output")
    except OSError as error:
        raise UserError(f"{out}: cannot be looked into: {error.strerror}") from error


def publish(out: Path, write: Callable[[Path], None], *, resumable: bool = False) -> None:
    """Have `write` fill a hidden folder beside `out`, then publish it in one rename.

    What a kill leaves cannot be taken for a result.

    Args:
        resumable: `write` gets what an earlier call left, and a failure leaves it to the next one.

    Raises:
        UserError: `out` is not an empty folder, another process is making it, or it could not be written.
    """
    check_new(out)
    with output_lock(out):
        check_new(out)
        _publish(out, write, resumable)


def _publish(out: Path, write: Callable[[Path], None], resumable: bool) -> None:
    aside = out.parent / f".{out.name}.partial"
    try:
        if aside.is_symlink() or aside.is_file():  # not ours
            aside.unlink()
        if not resumable:
            shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=True)
        for inside in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
            remove_leftovers(inside)
        write(aside)
        aside.replace(out)
    except BaseException as error:
        if not resumable:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            kept = "; the same command continues with what is not done yet" if resumable else ""
            raise UserError(f"{out}: could not be written: {error}{kept}") from error
        raise


def write_folder(
    out: Path,
    files: Mapping[str, Sequence[Stored]],
    finish: Callable[[Path], None],
    resume: Mapping[str, Any] | None = None,
) -> None:
    """Write the weight files of a new checkpoint folder, with their index, and publish it.

    Args:
        files: what goes into which file; the index covers those named as model weights (`model*.safetensors`), others
            and those in subfolders stand beside them.
        finish: called with the hidden folder at the end, to write config.json and the other small files.
        resume: identity of this job. Files that a killed job with the same identity has finished are kept. Without
            it the job begins anew, and a failure leaves nothing.

    Raises:
        UserError: `out` is not an empty folder, or the disk is too full, or fills up.
    """

    def write(aside: Path) -> None:
        progress = aside / _PROGRESS_FILE
        if resume is not None and not _is_of(progress, resume):
            shutil.rmtree(aside)
            aside.mkdir()
            write_json(progress, resume)
        todo = {name: tensors for name, tensors in files.items() if not _holds(aside / name, tensors)}
        _check_space(out, sum(tensor.nbytes for tensors in todo.values() for tensor in tensors))
        if len(todo) < len(files):
            print(f"{out}: continuing, {len(files) - len(todo)} of {len(files)} files are done", file=sys.stderr)
        for name, tensors in todo.items():
            (aside / name).parent.mkdir(exist_ok=True)
            write_safetensors(aside / name, tensors)
        _write_index(aside, {name: tensors for name, tensors in files.items() if fnmatch(name, "model*.safetensors")})
        finish(aside)
        progress.unlink(missing_ok=True)

    publish(out, write, resumable=resume is not None)


def _is_of(progress: Path, job: Mapping[str, Any]) -> bool:
    try:
        return bool(read_json(progress) == job)
    except UserError:  # none, or damaged
        return False


def _holds(file: Path, tensors: Sequence[Stored]) -> bool:
    if not file.is_file():
        return False
    try:
        found = {(t.name, t.shape, t.dtype) for t in stored_tensors(file)}
    except UserError:
        return False
    return found == {(t.name, t.shape, t.dtype) for t in tensors}


def _check_space(out: Path, needed: int) -> None:
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


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of `names` that are in `source`."""
    for name in names:
        if os.path.lexists(source / name):
            check_regular(source / name)
            shutil.copyfile(source / name, target / name)
