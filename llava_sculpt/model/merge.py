"""A base checkpoint rewritten weight by weight: merging an adapter, or any other change of single weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llava_sculpt.errors import UserError
from llava_sculpt.model.checkpoint import SIDE_FILES, BaseCheckpoint, weight_files
from llava_sculpt.model.layout import memory_name
from llava_sculpt.model.shards import (
    Stored,
    aside_of,
    check_output_folder,
    copy_files,
    publish_folder,
    stored_tensors,
    write_index,
    write_safetensors,
)
from llava_sculpt.records import write_json

Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def rewrite_checkpoint(checkpoint: BaseCheckpoint, out: Path, change: Change, dtype: torch.dtype | None = None) -> None:
    """Copy a base checkpoint to `out`, shard by shard, with some of its weights changed; one tensor in memory.

    Names on disk, shards and side files (config, tokenizer, processor) stay those of the base. The folder is built
    beside `out` and published in one rename: what a kill leaves cannot be taken for a model.

    Args:
        change: is given a weight's in-memory name (`model.language_model.layers.0.self_attn.q_proj.weight`) and its
            value, on the CPU in the dtype of the base; returns the new value (same shape, any floating dtype), or
            None to keep the weight's bytes.
        dtype: cast every floating weight to this dtype (default: each keeps its own).

    Raises:
        UserError: `out` is not empty, the disk is too full or fills up, or a shard of the base is damaged.
    """
    files = {file.name: stored_tensors(file) for file in weight_files(checkpoint.path)}
    changed = {name: [_changed(tensor, change, dtype) for tensor in tensors] for name, tensors in files.items()}
    check_output_folder(out, sum(tensor.nbytes for tensors in changed.values() for tensor in tensors))
    aside = aside_of(out)
    if aside.exists():  # left by a kill
        shutil.rmtree(aside)
    try:
        aside.mkdir()
        for name, tensors in changed.items():
            write_safetensors(aside / name, tensors)
        write_index(aside, changed)
        copy_files(checkpoint.path, aside, SIDE_FILES)
        write_json(aside / "config.json", config_with_dtype(checkpoint.config, dtype))
        publish_folder(aside, out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{out}: could not be written: {error}; nothing was left behind") from error
        raise


def _changed(tensor: Stored, change: Change, dtype: torch.dtype | None) -> Stored:
    target = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype

    def load() -> torch.Tensor:
        weight = tensor.load()
        new = change(memory_name(tensor.name), weight)
        return (weight if new is None else new).to(target)

    return Stored(tensor.name, tensor.shape, target, load)


def config_with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A copy of a config.json that names `dtype`, in whichever of its two spellings (and parts) it names one."""
    copied: dict[str, Any] = json.loads(json.dumps(config))
    if dtype is not None:
        for part in (copied, copied.get("text_config", {}), copied.get("vision_config", {})):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = str(dtype).removeprefix("torch.")
    return copied
