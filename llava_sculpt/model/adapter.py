"""What a run leaves on disk: a stock PEFT folder, the trained connector, the masks. Saved whole, loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from llava_sculpt.errors import UserError
from llava_sculpt.model.checkpoint import BaseCheckpoint
from llava_sculpt.model.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONNECTOR_FILE,
    RUN_FILE,
    read_tensors,
    write_tensors,
)
from llava_sculpt.model.lora import connector_weights, lora_pairs
from llava_sculpt.records import read_object


def save_adapter(model: PeftModel, folder: Path, state: dict[str, torch.Tensor], base_name: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and, if it was trained, connector.safetensors.

    Args:
        state: the trained tensors (LoRA, DoRA's magnitudes, the connector when it trains) by parameter name, whole also
            under ZeRO.
        base_name: the base checkpoint, recorded for PEFT.
    """
    model.peft_config["default"].base_model_name_or_path = base_name
    lora = {name: tensor.cpu() for name, tensor in state.items() if "lora_" in name}
    connector = {
        name.removeprefix("base_model.model."): tensor.cpu().contiguous()
        for name, tensor in state.items()
        if "lora_" not in name
    }
    # No look at the embeddings: they are not trained, and the look would ask the Hub for the base model.
    model.save_pretrained(str(folder), state_dict=lora, save_embedding_layers=False)
    # The library makes files that only their owner can read.
    (folder / ADAPTER_FILE).chmod((folder / ADAPTER_CONFIG).stat().st_mode)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written when the run ends
    if connector:
        write_tensors(folder / CONNECTOR_FILE, connector)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    Raises:
        UserError: not an adapter folder, or not JSON.
    """
    return read_object(folder / ADAPTER_CONFIG, f"{folder}: no {ADAPTER_CONFIG}: not an adapter folder")


def base_of(folder: Path, base: str | None = None) -> str:
    """Folder or Hub id of an adapter's base checkpoint: `base` if given, else the one its adapter_config.json names.

    Raises:
        UserError: not an adapter folder, or it names none.
    """
    named = base or read_adapter_config(folder).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is empty; name the base with --base")
    return named if base else find_upwards(named, folder)


def find_upwards(name: str, folder: Path) -> str:
    """A relative path that was recorded in `folder`, from here, else from a folder above; `name` if there is none.

    So a run in a repository finds `data/tiny_llava` whatever the working directory is.
    """
    places = (Path(), *folder.absolute().parents)
    return next((str(place / name) for place in places if (place / name).is_dir()), name)


def load_connector(model: nn.Module, folder: Path) -> None:
    """Put connector.safetensors of a run or checkpoint into the model, if the connector was trained.

    Raises:
        UserError: names or shapes that do not fit.
    """
    file = folder / CONNECTOR_FILE
    saved, own = read_tensors(file, optional=True), connector_weights(model)
    if not saved:
        return
    if {k: tuple(v.shape) for k, v in saved.items()} != {k: tuple(v.shape) for k, v in own.items()}:
        raise UserError(f"{file}: does not fit the base model's connector (other names or shapes)")
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def load_adapter(model: nn.Module, folder: Path, checkpoint: BaseCheckpoint) -> PeftModel:
    """Attach a saved adapter and connector to its base model, strictly.

    Raises:
        UserError: another base than the one trained on, missing or unexpected tensors, wrong shapes.
    """
    check_base(folder, checkpoint)
    saved = read_tensors(folder / ADAPTER_FILE)
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: does not fit {checkpoint.path}: {str(error).splitlines()[0]}") from error
    own = {key: p for pair in lora_pairs(peft_model) for key, p in pair.parameters()}
    # PEFT only warns about keys it could not place, and such an adapter is silently a no-op.
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())
        raise UserError(f"{folder / ADAPTER_FILE}: {len(odd)} tensors do not match the model, such as {odd[0]}")
    load_connector(peft_model, folder)
    if not (folder / CONNECTOR_FILE).exists() and not changes_anything(own):
        raise UserError(f"{folder / ADAPTER_FILE}: changes nothing: lora_B is zero everywhere (never trained?)")
    return peft_model


def check_base(folder: Path, checkpoint: BaseCheckpoint) -> None:
    """Refuse another base than the one an adapter was trained on, where run.json records it.

    The same files are the same base, and so are the same weights in other files or another layout (which runs before
    0.2 did not record).

    Raises:
        UserError: another base.
    """
    base = read_run(folder).get("base", {})
    if base.get("fingerprint") in (None, checkpoint.fingerprint()):
        return
    if base.get("weights") != checkpoint.weights_fingerprint():
        raise UserError(
            f"{folder}: was trained on another base than {checkpoint.path} "
            f"(recorded: {base.get('path')}); give the right one with --base"
        )


def changes_anything(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether any B of an adapter is not zero; if none is, BA = 0 and the model answers as its base does.

    (A magnitude vector of DoRA counts as a change.)
    """
    return any(bool(value.any()) for key, value in tensors.items() if ".lora_B." in key or "magnitude" in key)


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a folder, {} where there is none.

    Raises:
        UserError: not JSON.
    """
    file = folder / RUN_FILE
    return read_object(file) if file.is_file() else {}
