"""Opening a base checkpoint with its weights: fetched from the Hub, and converted where it is LLaVA's own layout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from llava_sculpt.artifacts.from_original import conversion_identity, convert_to_hf, find_tower
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import base_of
from llava_sculpt.model.checkpoint import BaseCheckpoint, find_base_checkpoint, find_folder, read_config
from llava_sculpt.model.layout import is_original
from llava_sculpt.model.shards import check_shards


def open_checkpoint(name_or_path: str, *, any_model: bool = False) -> BaseCheckpoint:
    """A base checkpoint in Hugging Face layout, with all its files, from a folder or a Hub id.

    One of the original LLaVA package is converted on first use, into `$XDG_CACHE_HOME/llava_sculpt` (default ~/.cache),
    under a name made of the weights of checkpoint and tower. Of several processes one converts and the others wait.

    Args:
        any_model: also models that are not LLaVA, which need config.json and safetensors only.

    Raises:
        UserError: nothing there, or everything that is wrong with it.
    """
    folder = fetch_folder(name_or_path)
    config = read_config(folder)
    if is_original(config):
        folder = _converted(folder, config)
    elif any_model and config.get("model_type") != "llava":
        problems = check_shards(folder)
        if problems:
            raise UserError(problems)
        return BaseCheckpoint(folder, config)
    return find_base_checkpoint(str(folder))


def open_base_of(adapter: Path, base: str | None = None, *, any_model: bool = False) -> BaseCheckpoint:
    """`open_checkpoint` of the base that an adapter folder names, or of `base` in its place.

    Raises:
        UserError: not an adapter folder, or it names none.
    """
    named = base_of(adapter, base)
    try:
        return open_checkpoint(named, any_model=any_model)
    except UserError as error:
        if os.path.isdir(named):
            raise
        raise UserError(f"{adapter}: its base: {error}; name it with --base") from error


def fetch_folder(name_or_path: str, weights: bool = True) -> Path:
    """`find_folder`, fetched from the Hub if need be: all of a checkpoint, or all but the weights.

    Raises:
        UserError: neither a folder nor a model that could be fetched.
    """
    # The small files first: config.json says which kind of weights to ask for.
    small = ["*.json", "*.jinja", "tokenizer.model"]
    folder = find_folder(name_or_path, small)
    if not weights:
        return folder
    pickled = ["pytorch_model*.bin"] if is_original(read_config(folder)) else []
    return find_folder(name_or_path, [*small, "*.safetensors", *pickled])


def _converted(source: Path, config: dict[str, Any]) -> Path:
    tower = find_tower(source, config["mm_vision_tower"])
    name = f"{source.resolve().name}-{conversion_identity(source, tower)[:16]}"
    out = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_sculpt" / name
    if not out.is_dir():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{out.parent}: cannot be made: {error.strerror} (XDG_CACHE_HOME names another)") from error
        with FileLock(out.with_name(f"{name}.lock")):
            if not out.is_dir():
                print(f"{source}: an original LLaVA checkpoint; converting it once into {out}", file=sys.stderr)
                convert_to_hf(source, out)
    return out
