"""Baselines that change a trained adapter: post-pruning gives an adapter again, DARE a merged model.

(Model Tailor, which also needs training data, is in `model_tailor.py`.) Outputs are new folders, published in one rename.
`edit.json` in them says what was done to which adapter, with the training's run.json.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llava_sculpt.artifacts.merge import WeightUpdate, check_shapes, rewrite_checkpoint, weight_updates
from llava_sculpt.errors import UserError
from llava_sculpt.methods import dropped_delta, post_pruned
from llava_sculpt.model.adapter import check_base, read_adapter_config, read_run
from llava_sculpt.model.checkpoint import BaseCheckpoint, find_base_checkpoint
from llava_sculpt.model.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONNECTOR_FILE,
    RUN_FILE,
    read_tensors,
    write_tensors,
)
from llava_sculpt.model.layout import memory_name
from llava_sculpt.model.lora import CONNECTOR
from llava_sculpt.model.processor import complete_processor
from llava_sculpt.model.shards import stored_tensors, weight_files
from llava_sculpt.records import file_sha256, versions, write_json

EDIT_FILE = "edit.json"


def post_prune(adapter: Path, out: Path, density: float) -> None:
    """Write an adapter whose LLM matrices A and B have only their largest entries (Fig. 1).

    The connector's LoRA or weights, DoRA's magnitudes and run.json stay as they are.

    Args:
        density: fraction of entries kept in each matrix, in (0, 1].

    Raises:
        UserError: not an adapter, a density out of range, `out` not empty or not writable.
    """
    read_adapter_config(adapter)
    tensors = read_tensors(adapter / ADAPTER_FILE)
    try:
        pruned = {
            key: post_pruned(value, density) if value.ndim == 2 and CONNECTOR not in key else value
            for key, value in tensors.items()
        }
    except ValueError as error:
        raise UserError(f"{adapter / ADAPTER_FILE}: {error}") from error
    check_new(out)
    aside = out.parent / f".{out.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)  # left by a kill
    try:
        aside.mkdir(parents=True)
        write_tensors(aside / ADAPTER_FILE, pruned)
        for name in (ADAPTER_CONFIG, CONNECTOR_FILE, RUN_FILE):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, aside / name)
        write_json(aside / EDIT_FILE, edit_record(adapter, "post_prune", {"density": density}))
        aside.replace(out)
    except OSError as error:
        raise UserError(f"{out}: could not be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def dare(adapter: Path, out: Path, drop: float, seed: int, base: str | None = None) -> None:
    """Write the base model with the adapter's delta, its entries dropped at random and the rest rescaled (DARE).

    A fully fine-tuned connector is taken over as it is trained.

    Args:
        drop: probability that an entry is dropped, in [0, 1).
        base: base checkpoint, if not the one the adapter names.

    Raises:
        UserError: not an adapter or of another base, drop out of range, `out` not empty or not writable.
    """
    if not 0 <= drop < 1:
        raise UserError(f"drop: must be in [0, 1), got {drop}")
    checkpoint, updates, connector = open_adapter(adapter, base)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if name not in updates:
            return connector.get(name)
        update, whole = updates[name], weight.float()
        delta = update.delta() if update.magnitude is None else update.apply(weight) - whole
        return whole + dropped_delta(delta, drop, seed, name)

    write_edited(checkpoint, out, change, edit_record(adapter, "dare", {"drop": drop, "seed": seed}))


def open_adapter(
    adapter: Path, base: str | None
) -> tuple[BaseCheckpoint, dict[str, WeightUpdate], dict[str, torch.Tensor]]:
    """The base of an adapter, what it changes, and the connector's trained weights, all checked against the base.

    Raises:
        UserError: not an adapter, another base, shapes that do not fit.
    """
    checkpoint = find_base_checkpoint(base or read_adapter_config(adapter)["base_model_name_or_path"])
    check_base(adapter, checkpoint)
    updates, connector = weight_updates(adapter)
    shapes = {memory_name(t.name): t.shape for file in weight_files(checkpoint.path) for t in stored_tensors(file)}
    check_shapes(adapter, checkpoint, shapes, updates, connector)
    return checkpoint, updates, connector


def edit_record(adapter: Path, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Content of edit.json."""
    return {
        "method": method,
        "settings": settings,
        "adapter": {"path": str(adapter), "sha256": file_sha256(adapter / ADAPTER_FILE)},
        "run": read_run(adapter),
        "versions": versions(),
    }


def write_edited(
    checkpoint: BaseCheckpoint,
    out: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor | None],
    record: dict[str, Any],
) -> None:
    """Write a changed copy of the base checkpoint with its edit.json; see `rewrite_checkpoint`."""

    def finish(folder: Path) -> None:
        write_json(folder / EDIT_FILE, record)
        complete_processor(folder, checkpoint.config)

    rewrite_checkpoint(checkpoint, out, change, finish=finish)


def check_new(out: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        UserError: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another one for the output")
