"""`llava-sculpt convert`: checkpoints and adapters between Hugging Face layout and the original LLaVA package."""

from __future__ import annotations

from pathlib import Path

from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import read_adapter_config
from llava_sculpt.model.checkpoint import find_base_checkpoint, find_folder
from llava_sculpt.model.from_original import convert_to_hf, is_original
from llava_sculpt.model.shards import read_config
from llava_sculpt.model.to_original import convert_to_original
from llava_sculpt.model.travel import adapter_to_hf, adapter_to_original, is_original_adapter


def convert_checkpoint(source: str, to: str, out: Path) -> None:
    """Convert a checkpoint (folder or Hub id) to the layout `to`, "hf" or "original".

    Raises:
        UserError: it is in that layout already, or everything that is wrong with it.
    """
    folder = find_folder(source)
    if is_original(read_config(folder)) == (to == "original"):
        raise UserError(f"{source}: is in the layout {to!r} already")
    if to == "hf":
        convert_to_hf(folder, out)
    else:
        convert_to_original(find_base_checkpoint(str(folder)), out)


def convert_adapter(folder: Path, to: str, out: Path, base: str | None = None) -> None:
    """Convert an adapter folder to the layout `to`, "hf" (this project, stock peft) or "original".

    Args:
        base: base checkpoint, if not the one the adapter names.

    Raises:
        UserError: it is in that layout already, or what is wrong with it or its base.
    """
    if is_original_adapter(folder) == (to == "original"):
        raise UserError(f"{folder}: is in the layout {to!r} already")
    if to == "hf":
        adapter_to_hf(folder, out, base)
        return
    named = base or read_adapter_config(folder).get("base_model_name_or_path") or ""
    adapter_to_original(folder, out, find_base_checkpoint(named), named)
