"""A sparse adapter as one small file: which entries of A and B are kept, coded, and their values.

Layout (safetensors, `"format_version": "llava_sculpt.sparse.v1"` in its metadata):

- for every LoRA matrix KEY of adapter_model.safetensors two tensors: `KEY.kept`, uint8, the zlib stream of the
  matrix's mask in row-major order, 8 entries a byte, the first in the highest bit (`numpy.packbits`); `KEY.values`, the
  kept entries in the same order, in the dtype of the file, or of `--dtype`;
- the trained connector, if there is one, as `connector:NAME`, whole;
- metadata: `shapes` (JSON: KEY -> [rows, columns]), `adapter_config` (PEFT's, JSON), `run` (run.json with the base's
  fingerprint and versions, JSON, "{}" if there was none), `masks` (JSON list: the
  matrices whose mask is LoRASculpt's own; of the others it was read off the zeros).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from llava_sculpt.artifacts.merge import bits
from llava_sculpt.artifacts.writing import in_memory, publish, save_tensors, write_export
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import read_adapter_config, read_run
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE, RUN_FILE, read_tensors
from llava_sculpt.records import write_json

VERSION = "llava_sculpt.sparse.v1"
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
    entries = int(np.prod(shape))
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
        UserError: not an adapter folder, a damaged file, entries off the masks, `file` exists or cannot be written.
    """
    if file.exists():
        raise UserError(f"{file}: exists; choose another name")
    config = read_adapter_config(folder)
    tensors = read_tensors(folder / ADAPTER_FILE)
    masks = read_tensors(folder / MASKS_FILE, optional=True)
    coded: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        nonzero = bits(tensor) != 0  # keeps a negative zero
        mask = masks.get(key, nonzero)
        if mask.shape != tensor.shape or bool((nonzero & ~mask).any()):
            raise UserError(
                f"{folder / MASKS_FILE}: {key} has entries off its mask; this adapter was changed afterwards"
            )
        coded[f"{key}.kept"] = pack_mask(mask)
        coded[f"{key}.values"] = tensor[mask].to(dtype or tensor.dtype)
    lora = sum(value.nbytes for value in coded.values())
    connector = read_tensors(folder / CONNECTOR_FILE, optional=True)
    coded |= {_CONNECTOR + name: value for name, value in connector.items()}
    metadata = {
        "format_version": VERSION,
        "shapes": json.dumps({key: list(value.shape) for key, value in tensors.items()}),
        "adapter_config": json.dumps(config),
        "run": json.dumps(read_run(folder)),
        "masks": json.dumps(sorted(masks)),
    }
    write_export(file, in_memory(coded), metadata)
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
    tensors, masks = {}, {}
    named = set(json.loads(metadata["masks"]))
    try:
        for key, shape in json.loads(metadata["shapes"]).items():
            mask = unpack_mask(coded[f"{key}.kept"], tuple(shape))
            values = coded[f"{key}.values"]
            if int(mask.sum()) != values.numel():
                raise ValueError(f"{values.numel()} values for {int(mask.sum())} kept entries")
            tensors[key] = torch.zeros(shape, dtype=values.dtype)
            tensors[key][mask] = values
            if key in named:
                masks[key] = mask
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error})") from error
    connector = {name.removeprefix(_CONNECTOR): v for name, v in coded.items() if name.startswith(_CONNECTOR)}
    run = json.loads(metadata["run"])

    def write(folder: Path) -> None:
        write_json(folder / ADAPTER_CONFIG, json.loads(metadata["adapter_config"]))
        save_tensors(folder / ADAPTER_FILE, tensors)
        if masks:
            save_tensors(folder / MASKS_FILE, masks)
        if connector:
            save_tensors(folder / CONNECTOR_FILE, connector)
        if run:
            write_json(folder / RUN_FILE, run)

    publish(out, write)


def read_with_metadata(file: Path, version: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of one of our export files.

    Raises:
        UserError: missing, damaged, or another kind of file.
    """
    tensors = read_tensors(file)
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata: dict[str, Any] = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error})") from error
    if metadata.get("format_version") != version:
        raise UserError(f"{file}: not a file of the format {version}")
    return metadata, tensors
