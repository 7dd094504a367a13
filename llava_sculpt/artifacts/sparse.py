"""A sparse adapter as one small file: which entries of A and B are kept, coded, and their values.

Layout (safetensors, `"format_version": "llava_sculpt.sparse.v1"` in its metadata):

- for every LoRA matrix KEY of adapter_model.safetensors two tensors: `KEY.kept`, uint8, the zlib stream of the
  matrix's mask in row-major order, 8 entries a byte, the first in the highest bit (`numpy.packbits`); `KEY.values`, the
  kept entries in the same order, in the dtype of the file, or of `--dtype`;
- the trained connector, if there is one, as `connector:NAME`, whole;
- metadata: `shapes` (JSON: KEY -> [rows, columns]), `adapter_config` (PEFT's, JSON), `run` (run.json with the base's
  fingerprint and versions, JSON, "{}" if there was none), `masks` (JSON list: the
  matrices whose mask is LoRASculpt's own; of the others it was read off the zeros), `sha256` of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from llava_sculpt.artifacts.merge import bits
from llava_sculpt.artifacts.writing import check_no_file, in_memory, publish, save_tensors, write_export
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import check_adapter_config, read_adapter
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE, read_tensors
from llava_sculpt.model.shards import Stored
from llava_sculpt.model.whole import check_run, read_run, seal_run
from llava_sculpt.records import checked, parse_json, write_json

VERSION = "llava_sculpt.sparse.v1"
Shapes = dict[str, Annotated[list[Annotated[int, Field(ge=0, le=1 << 24)]], Field(min_length=1, max_length=2)]]
_CONNECTOR = "connector:"


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor as a zlib stream of its bits (uint8, 1-D)."""
    stream = zlib.compress(np.packbits(mask.flatten().numpy()).tobytes(), 9)
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def unpack_mask(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pack_mask`.

    Raises:
        ValueError: not a zlib stream of that many bits.
    """
    entries = math.prod(shape)
    if packed.dtype != torch.uint8:
        raise ValueError(f"a mask of type {packed.dtype}")
    size = -(-entries // 8)
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(packed.numpy().tobytes(), size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(content) != size or not reader.eof:
        raise ValueError(f"{len(content)} bytes, expected {size}")
    bits = np.unpackbits(np.frombuffer(content, np.uint8), count=entries)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def export_sparse(folder: Path, file: Path, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Write an adapter folder as one sparse file.

    Args:
        dtype: of the values (default: as they are; another one rounds them).

    Returns:
        Bytes: `lora` (masks and values), `connector`, and `dense_bf16`, the LoRA matrices as dense bfloat16.

    Raises:
        UserError: as `read_adapter`; entries off the masks, `file` exists or cannot be written.
    """
    check_no_file(file)
    saved = read_adapter(folder)
    tensors, masks, connector = saved.tensors, saved.masks, saved.connector
    coded: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        nonzero = bits(tensor) != 0  # keeps a negative zero
        mask = masks.get(key, nonzero)
        if bool((nonzero & ~mask).any()):
            raise UserError(
                f"{folder / MASKS_FILE}: {key} has entries off its mask; this adapter was changed afterwards"
            )
        coded[f"{key}.kept"] = pack_mask(mask)
        coded[f"{key}.values"] = tensor[mask].to(dtype or tensor.dtype)
    lora = sum(value.nbytes for value in coded.values())
    coded |= {_CONNECTOR + name: value for name, value in connector.items()}
    metadata = {
        "format_version": VERSION,
        "shapes": json.dumps({key: list(value.shape) for key, value in tensors.items()}),
        "adapter_config": json.dumps(saved.config),
        "run": json.dumps(read_run(folder)),
        "masks": json.dumps(sorted(masks)),
    }
    stored = in_memory(coded)
    write_export(file, stored, metadata | {"sha256": content_sha256(metadata, stored)})
    return {
        "lora": lora,
        "connector": sum(value.nbytes for value in connector.values()),
        "dense_bf16": sum(2 * value.numel() for value in tensors.values()),
    }


def import_sparse(file: Path, out: Path) -> None:
    """Write the adapter folder (stock PEFT, masks, connector) of a sparse file: the same bits that went in.

    Raises:
        UserError: not such a file, or damaged; `out` is not an empty folder.
    """
    metadata, coded = read_with_metadata(file, VERSION)
    shapes = metadata_value(metadata, "shapes", Shapes, file)
    named = set(metadata_value(metadata, "masks", list[str], file))
    config = metadata_value(metadata, "adapter_config", dict[str, Any], file)
    check_adapter_config(config, file)
    run = metadata_value(metadata, "run", dict[str, Any], file)
    if run:
        check_run(run, file)
    tensors, masks = {}, {}
    try:
        for key, shape in shapes.items():
            mask = unpack_mask(coded[f"{key}.kept"], tuple(shape))
            values = coded[f"{key}.values"]
            if values.shape != (int(mask.sum()),):
                raise ValueError(f"{list(values.shape)} values for {int(mask.sum())} kept entries")
            tensors[key] = torch.zeros(shape, dtype=values.dtype)
            tensors[key][mask] = values
            if key in named:
                masks[key] = mask
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error})") from error
    connector = {name.removeprefix(_CONNECTOR): v for name, v in coded.items() if name.startswith(_CONNECTOR)}

    def write(folder: Path) -> None:
        write_json(folder / ADAPTER_CONFIG, config)
        save_tensors(folder / ADAPTER_FILE, tensors)
        if masks:
            save_tensors(folder / MASKS_FILE, masks)
        if connector:
            save_tensors(folder / CONNECTOR_FILE, connector)
        if run:
            seal_run(folder, run)

    publish(out, write)


def read_with_metadata(file: Path, version: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of one of our export files.

    Raises:
        UserError: missing, damaged, or another kind of file.
    """
    tensors = read_tensors(file)
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error})") from error
    if metadata.get("format_version") != version:
        raise UserError(f"{file}: not a file of the format {version}")
    recorded = metadata.pop("sha256", None)  # since 0.2
    metadata.pop("format", None)
    if recorded not in (None, content_sha256(metadata, in_memory(tensors))):
        raise UserError(f"{file}: damaged: its content is not what was written")
    return metadata, tensors


def content_sha256(metadata: dict[str, str], tensors: Sequence[Stored]) -> str:
    """sha256 over the metadata of an export file and, by name, its tensors, one in memory at a time."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.load().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def metadata_value(metadata: dict[str, str], key: str, kind: Any, file: Path) -> Any:
    """The JSON value under `key` in the metadata of an export file, as `records.checked`.

    Raises:
        UserError: missing, not JSON, or something else than `kind`.
    """
    if key not in metadata:
        raise UserError(f"{file}: {key} is missing in its metadata")
    return checked(parse_json(metadata[key], file), kind, f"{file}: {key}")
