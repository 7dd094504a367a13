"""`llava-sculpt convert`: checkpoints and adapters between Hugging Face layout and the original LLaVA package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llava_sculpt.artifacts.from_original import convert_to_hf
from llava_sculpt.artifacts.open import fetch_folder, open_checkpoint
from llava_sculpt.artifacts.to_original import convert_to_original, original_config
from llava_sculpt.artifacts.travel import adapter_to_hf, adapter_to_original, is_original_adapter
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import read_adapter_config
from llava_sculpt.model.checkpoint import find_base_checkpoint, read_config
from llava_sculpt.model.layout import CLIP_L_336, CLIP_NAME, is_original


def convert_checkpoint(source: str, to: str, out: Path) -> None:
    """Convert a checkpoint (folder or Hub id) to the layout `to`, "hf" or "original".

    Raises:
        UserError: it is in that layout already, or everything that is wrong with it.
    """
    folder = fetch_folder(source)
    if is_original(read_config(folder)) == (to == "original"):
        raise UserError(f"{source}: is in the layout {to!r} already")
    if to == "hf":
        convert_to_hf(folder, out)
    else:
        _warn_of_name(out, "llava")
        convert_to_original(open_checkpoint(str(folder)), out)


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
    _warn_of_name(out, "llava", "lora")
    adapter_to_original(folder, out, _original_config_of(named), named)


def _warn_of_name(out: Path, *words: str) -> None:
    """LLaVA's loader goes by the folder's name (and a converted checkpoint names its tower by an absolute path)."""
    name = out.resolve().name
    lacking = [word for word in words if word not in name.lower()]
    if lacking:
        print(
            f"warning: {out}: LLaVA loads it as another kind of model unless the folder's name contains "
            f"{' and '.join(map(repr, words))}; convert into {out.with_name('-'.join([*lacking, name]))}, for example",
            file=sys.stderr,
        )


def _original_config_of(base: str) -> dict[str, Any]:
    folder = fetch_folder(base, weights=False)
    config = read_config(folder)
    if is_original(config):
        return config
    checkpoint = find_base_checkpoint(str(folder), weights=False)
    if checkpoint.image_size != CLIP_L_336["image_size"]:
        raise UserError(
            f"{base}: its vision tower is not LLaVA-1.5's; give the base in the original's layout with --base (convert "
            "checkpoint --to original): its config.json says where the tower is, and the original wants to know that"
        )
    return original_config(checkpoint, CLIP_NAME)
