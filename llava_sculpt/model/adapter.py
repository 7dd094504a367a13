"""What a run leaves on disk: a stock PEFT folder, the trained connector, the masks. Saved whole, loaded strictly."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from pydantic import Field
from torch import nn
from typing_extensions import NotRequired, TypedDict

from llava_sculpt.errors import UserError
from llava_sculpt.model.checkpoint import BaseCheckpoint
from llava_sculpt.model.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    COMPLETE_FILE,
    CONNECTOR_FILE,
    MASKS_FILE,
    check_finite,
    read_tensors,
    write_tensors,
)
from llava_sculpt.model.lora import connector_weights, lora_pairs
from llava_sculpt.model.whole import check_whole, read_run
from llava_sculpt.records import checked, read_object

_PREFIX = "base_model.model."
_Positive = Annotated[float, Field(gt=0, le=1e6)]
_Rank = Annotated[int, Field(gt=0)]


class AdapterConfig(TypedDict):
    """What is read of adapter_config.json. Which modules have LoRA is read off the weights, not off this file."""

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Positive
    use_rslora: NotRequired[bool]
    use_dora: NotRequired[bool]
    rank_pattern: NotRequired[dict[str, _Rank] | None]
    alpha_pattern: NotRequired[dict[str, _Positive] | None]
    base_model_name_or_path: NotRequired[str | None]
    target_modules: NotRequired[str | list[str] | None]
    # The other starts change the base's weights.
    init_lora_weights: NotRequired[bool | Literal["gaussian", "eva", "orthogonal"] | None]


# What of PEFT's settings makes no difference to a trained adapter whose modules are known.
_NO_DIFFERENCE = frozenset(
    """
    auto_mapping revision task_type inference_mode peft_version lora_dropout exclude_modules layers_to_transform
    layers_pattern loftq_config eva_config megatron_config megatron_core ensure_weight_tying qalora_group_size
    """.split()
)
# PEFT reads keys of rank_pattern and alpha_pattern as regular expressions; these cannot run for ever.
_PLAIN_NAME = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class LoraMatrices:
    """What an adapter has for one linear layer W (p, q): A (r, q), B (p, r), DoRA's magnitude (p,) or None."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor | None
    scaling: float


@dataclass(frozen=True)
class SavedAdapter:
    """A whole adapter folder in memory; everything in it fits together.

    Attributes:
        tensors: of adapter_model.safetensors, by key. connector: its trained weights by in-memory name, or nothing.
        masks: by key of `tensors`, bool, or nothing.
        layers: the same tensors by module name in the base model.
    """

    folder: Path
    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    connector: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]
    layers: dict[str, LoraMatrices]


def save_adapter(model: PeftModel, folder: Path, state: dict[str, torch.Tensor], base_name: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and, if it was trained, connector.safetensors.

    Args:
        state: the trained tensors (LoRA, DoRA's magnitudes, the connector when it trains) by parameter name, whole also
            under ZeRO.
        base_name: the base checkpoint, recorded for PEFT.

    Raises:
        UserError: a value that is NaN or infinite; nothing has been written.
    """
    check_finite(state.items(), f"{folder}: not saved")
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


def read_adapter_config(folder: Path) -> AdapterConfig:
    """adapter_config.json of a folder.

    Raises:
        UserError: not an adapter folder, or not a LoRA adapter; every setting that is wrong, or is not read here and
            would make a difference.
    """
    file = folder / ADAPTER_CONFIG
    config = read_object(file, f"{folder}: no {ADAPTER_CONFIG}: not an adapter folder")
    return check_adapter_config(config, file)


def check_adapter_config(config: dict[str, Any], source: Path) -> AdapterConfig:
    """The content of an adapter_config.json, as `read_adapter_config`."""
    known = checked(config, AdapterConfig, source)
    defaults = LoraConfig().to_dict()
    unread = defaults.keys() - AdapterConfig.__annotations__.keys() - _NO_DIFFERENCE
    problems = [
        f"{source}: {key} is {config[key]!r}, only {defaults[key]!r} is understood here"
        for key in sorted(unread & config.keys())
        if config[key] and config[key] != defaults[key]
    ]
    problems += [
        f"{source}: {pattern}: {key!r} is not a plain name; patterns are not evaluated"
        for pattern in ("rank_pattern", "alpha_pattern")
        for key in config.get(pattern) or {}
        if not _PLAIN_NAME.fullmatch(key)
    ]
    if problems:
        raise UserError(problems)
    return known


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter folder of a run, a checkpoint or stock PEFT.

    Raises:
        UserError: not whole (`check_whole`), not a LoRA adapter, a damaged file, NaN, or tensors that do not fit
            together or `adapter_config.json`.
    """
    check_whole(folder)
    config = read_adapter_config(folder)
    file = folder / ADAPTER_FILE
    tensors = read_tensors(file)
    connector = read_tensors(folder / CONNECTOR_FILE, optional=True)
    masks = read_tensors(folder / MASKS_FILE, optional=True)
    layers, taken, problems = {}, set(), []
    for key_A in (key for key in tensors if key.endswith(".lora_A.weight")):
        module = key_A.removesuffix(".lora_A.weight")
        name = module.removeprefix(_PREFIX)
        key_B, key_m = f"{module}.lora_B.weight", f"{module}.lora_magnitude_vector"
        taken |= {key_A, key_B, key_m}
        lora_A, lora_B, magnitude = tensors[key_A], tensors.get(key_B), tensors.get(key_m)
        rank = _of_pattern(config.get("rank_pattern"), name, config["r"])
        if lora_B is None or lora_A.shape[:1] != (rank,) or lora_B.shape[1:] != (rank,) or lora_A.ndim != 2:
            problems.append(f"{file}: {module}: no pair of A (r, q) and B (p, r) with r = {rank}")
            continue
        if config.get("use_dora", False) != (magnitude is not None):
            there = "missing" if magnitude is None else "there"
            problems.append(f"{file}: {key_m} is {there}, use_dora is {config.get('use_dora', False)}")
        elif magnitude is not None and magnitude.shape != lora_B.shape[:1]:
            problems.append(f"{file}: {key_m} is {list(magnitude.shape)}, expected {[lora_B.shape[0]]}")
        alpha = _of_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        layers[name] = LoraMatrices(lora_A, lora_B, magnitude, scaling)
    problems += [f"{file}: unexpected tensor {key}" for key in sorted(tensors.keys() - taken)]
    problems += [f"{file}: {key} is of type {t.dtype}" for key, t in tensors.items() if not t.is_floating_point()]
    problems += [
        f"{folder / MASKS_FILE}: {key} is not a mask of a matrix of {ADAPTER_FILE}"
        for key, mask in masks.items()
        if key not in tensors or mask.shape != tensors[key].shape or mask.dtype != torch.bool
    ]
    if not problems and not layers:
        problems.append(f"{file}: no LoRA matrices in it")
    if problems:
        raise UserError(problems)
    return SavedAdapter(folder, config, tensors, connector, masks, layers)


def _of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says of a module, by PEFT's rule."""
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), name), default)


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
    return next((str(place / name) for place in places if os.path.isdir(place / name)), name)


def load_connector(model: nn.Module, folder: Path) -> None:
    """Put connector.safetensors of a run or checkpoint into the model, if the connector was trained.

    Raises:
        UserError: names or shapes that do not fit.
    """
    file = folder / CONNECTOR_FILE
    _put_connector(model, read_tensors(file, optional=True), file)


def _put_connector(model: nn.Module, saved: dict[str, torch.Tensor], file: Path) -> None:
    own = connector_weights(model) if saved else {}
    if {k: tuple(v.shape) for k, v in saved.items()} != {k: tuple(v.shape) for k, v in own.items()}:
        raise UserError(f"{file}: does not fit the base model's connector (other names or shapes)")
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def load_adapter(model: nn.Module, saved: SavedAdapter, checkpoint: BaseCheckpoint) -> PeftModel:
    """Attach a saved adapter and connector to its base model, strictly.

    Raises:
        UserError: another base than the one trained on, layers or shapes that it does not have, or a no-op.
    """
    folder = saved.folder
    check_base(folder, checkpoint)
    check_changes(saved)
    config = LoraConfig(
        r=saved.config["r"],
        lora_alpha=saved.config["lora_alpha"],  # type: ignore[arg-type]  # a float is fine
        # By name: what the file has for it may be any regular expression.
        target_modules=list(saved.layers),
        rank_pattern=saved.config.get("rank_pattern") or {},
        alpha_pattern=saved.config.get("alpha_pattern") or {},
        use_rslora=saved.config.get("use_rslora", False),
        use_dora=saved.config.get("use_dora", False),
        inference_mode=True,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model: Any = get_peft_model(model, config)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: does not fit {checkpoint.path}: {str(error).splitlines()[0]}") from error
    own = {key: p for pair in lora_pairs(peft_model) for key, p in pair.parameters()}
    odd = sorted(own.keys() ^ saved.tensors.keys())
    odd += [key for key in own.keys() & saved.tensors.keys() if own[key].shape != saved.tensors[key].shape]
    if odd:
        raise UserError(f"{folder / ADAPTER_FILE}: {len(odd)} tensors do not match the model, such as {odd[0]}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(saved.tensors[key])
    _put_connector(peft_model, saved.connector, folder / CONNECTOR_FILE)
    return peft_model


def check_base(folder: Path, checkpoint: BaseCheckpoint) -> None:
    """Refuse another base than the one an adapter was trained on, where run.json records it.

    The same files are the same base, and so are the same weights in other files or another layout with the
    same configuration, preprocessing and tokenizer, as far as run.json records them (0.1 did not).

    Raises:
        UserError: another base.
    """
    # A checkpoint's run.json is that of the run it lies in.
    inside = os.path.lexists(folder / COMPLETE_FILE)
    base = (read_run(folder) or (read_run(folder.absolute().parent) if inside else {})).get("base")
    if base is None:
        return
    same = base["fingerprint"] == checkpoint.fingerprint() or base.get("weights") == checkpoint.weights_fingerprint()
    recorded = base.get("architecture")
    if not same or (recorded is not None and recorded != checkpoint.architecture()):
        raise UserError(
            f"{folder}: was trained on another base than {checkpoint.path} "
            f"(recorded: {base['path']}); give the right one with --base"
        )


def check_changes(saved: SavedAdapter) -> None:
    """Refuse an adapter whose every B is zero: BA = 0, and the model would answer as its base does.

    (A trained connector or a magnitude vector of DoRA counts as a change.)

    Raises:
        UserError: it changes nothing.
    """
    changing = (t for key, t in saved.tensors.items() if ".lora_B." in key or "magnitude" in key)
    if not saved.connector and not any(bool(tensor.any()) for tensor in changing):
        file = saved.folder / ADAPTER_FILE
        raise UserError(f"{file}: changes nothing: lora_B is zero everywhere (never trained?)")
