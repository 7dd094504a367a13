"""Adapters between here and the original LLaVA package: keys, targets, connector, configuration."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from llava_sculpt.artifacts.writing import publish, save_tensors
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import AdapterConfig, read_adapter, read_adapter_config
from llava_sculpt.model.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONNECTOR_FILE,
    MASKS_FILE,
    NON_LORA_FILE,
    PICKLED_ADAPTER,
    read_tensors,
)
from llava_sculpt.model.layout import LANGUAGE, PROJECTOR, key_of_original, original_key
from llava_sculpt.model.lora import CONNECTOR_TARGETS
from llava_sculpt.model.shards import mapped_pickle, stored_tensors
from llava_sculpt.model.whole import check_whole, copy_run
from llava_sculpt.records import versions, write_atomically, write_json

_LAYER = "base_model.model.model.language_model.layers."

# What LoraConfig of peft 0.10 knows, the version in the environments of LLaVA: it stops at any other key.
_PEFT_0_10 = frozenset(
    """
    peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules lora_alpha
    lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern
    rank_pattern alpha_pattern megatron_config megatron_core loftq_config use_dora layer_replication
    """.split()
)


def adapter_to_original(folder: Path, out: Path, base_config: dict[str, Any], base_name: str) -> None:
    """Write an adapter folder that the original's `load_pretrained_model` and peft >= 0.10 read.

    It holds adapter_config.json, adapter_model.safetensors, non_lora_trainables.bin (the trained connector, or
    nothing) and the original's config.json. Values keep their bits.

    Args:
        base_config: config.json of the base in the original's layout; the original reads it from the adapter.
        base_name: recorded in adapter_config.json.

    Raises:
        UserError: not an adapter of this project's layout, or one whose settings peft 0.10 does not have.
    """
    saved = read_adapter(folder)
    tensors, config = saved.tensors, saved.config
    problems = [
        f"{folder / ADAPTER_FILE}: {key} is not in the language model or the connector"
        for key in tensors
        if not key.startswith((f"base_model.model.{LANGUAGE}", f"base_model.model.{PROJECTOR}"))
    ]
    problems += _unknown_to_peft_0_10(config, folder / ADAPTER_CONFIG)
    problems += _uneven_layers(tensors, folder / ADAPTER_FILE)
    if problems:
        raise UserError(problems)

    def write(aside: Path) -> None:
        kept: dict[str, Any] = {key: value for key, value in config.items() if key in _PEFT_0_10}
        alpha = config["lora_alpha"]
        kept["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
        kept |= {"base_model_name_or_path": base_name, "target_modules": _original_targets(tensors)}
        write_json(aside / ADAPTER_CONFIG, kept)
        save_tensors(aside / ADAPTER_FILE, {original_key(key): value for key, value in tensors.items()})
        connector = {original_key(f"base_model.model.{name}"): value for name, value in saved.connector.items()}
        pickled = io.BytesIO()  # torch.save reports a full disk as anything
        torch.save(connector, pickled)
        write_atomically(aside / NON_LORA_FILE, pickled.getvalue())
        write_json(aside / "config.json", base_config)
        _keep_record(folder, aside, rename=original_key)

    publish(out, write)


def adapter_to_hf(folder: Path, out: Path, base_name: str | None) -> None:
    """Write an adapter folder for this project and stock peft from one that the original package has written.

    Args:
        base_name: recorded in adapter_config.json instead of the base the adapter names.

    Raises:
        UserError: not such an adapter, or it holds other trained weights than LoRA and the connector.
    """
    check_whole(folder)
    pickled = folder / PICKLED_ADAPTER
    tensors = mapped_pickle(pickled) if os.path.lexists(pickled) else read_tensors(folder / ADAPTER_FILE)
    config = read_adapter_config(folder)
    lora = {key_of_original(key): value for key, value in tensors.items()}
    problems = [
        f"{folder}: {theirs} is not in the language model or the connector"
        for theirs, key in zip(tensors, lora, strict=True)
        if not key.startswith((f"base_model.model.{LANGUAGE}", f"base_model.model.{PROJECTOR}"))
    ]
    problems += _uneven_layers(lora, folder)
    others_file = folder / NON_LORA_FILE
    others = mapped_pickle(others_file) if os.path.lexists(others_file) else {}
    connector = {}
    for theirs, value in others.items():
        # LLaVA's own reader takes these three forms: base_model.model.X, model.X and X.
        name = "model." + theirs.removeprefix("base_model.").removeprefix("model.").removeprefix("model.")
        name = key_of_original(name).removeprefix("base_model.model.")
        if not name.startswith(PROJECTOR):
            problems.append(f"{others_file}: {theirs} is not of the connector; only that can be trained here")
        connector[name] = value
    if problems:
        raise UserError(problems)

    def write(aside: Path) -> None:
        named = base_name or config.get("base_model_name_or_path")
        write_json(
            aside / ADAPTER_CONFIG, {**config, "base_model_name_or_path": named, "target_modules": _hf_targets(lora)}
        )
        save_tensors(aside / ADAPTER_FILE, lora)
        if connector:
            save_tensors(aside / CONNECTOR_FILE, connector)
        _keep_record(folder, aside, rename=key_of_original)

    publish(out, write)


def is_original_adapter(folder: Path) -> bool:
    """Whether an adapter folder has the original package's keys.

    Raises:
        UserError: not an adapter folder.
    """
    read_adapter_config(folder)
    if os.path.lexists(folder / PICKLED_ADAPTER):
        return True
    keys = [tensor.name for tensor in stored_tensors(folder / ADAPTER_FILE)]
    return not any(LANGUAGE in key or PROJECTOR in key for key in keys)


def _unknown_to_peft_0_10(config: AdapterConfig, file: Path) -> list[str]:
    defaults = LoraConfig().to_dict()
    return [
        f"{file}: {key} is {value!r}, which peft 0.10 (LLaVA's) does not have"
        for key, value in config.items()
        if key not in _PEFT_0_10 and key in defaults and value != defaults[key] and value
    ]


def _suffixes(tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Adapted modules of the language model (q_proj, ...) and of the connector (linear_1, ...), in the usual order."""
    modules = {key.partition(".lora_")[0] for key in tensors}
    usual = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    language = {module.rpartition(".")[2] for module in modules if LANGUAGE in module}
    order = [name for name in usual if name in language] + sorted(language - set(usual))
    return order, sorted(module.rpartition(".")[2] for module in modules if PROJECTOR in module)


def _uneven_layers(tensors: dict[str, torch.Tensor], file: Path) -> list[str]:
    """The targets are written as one pattern for all layers, so every layer must have the same ones."""
    layers: dict[str, set[str]] = {}
    for key in tensors:
        if key.startswith(_LAYER):
            number, _, rest = key.removeprefix(_LAYER).partition(".")
            layers.setdefault(number, set()).add(rest)
    most = max(layers.values(), key=len, default=set())
    return [
        f"{file}: layer {number} lacks {', '.join(sorted(most - there)[:3])}, which other layers have"
        for number, there in sorted(layers.items())
        if there != most
    ]


def _original_targets(tensors: dict[str, torch.Tensor]) -> str:
    language, connector = _suffixes(tensors)
    # Anchored, unlike LLaVA's own list of names: with a loaded tower those would land on CLIP as well.
    parts = [rf"model\.layers\..*\.({'|'.join(language)})"] if language else []
    if connector:
        index = {"linear_1": "0", "linear_2": "2"}
        parts.append(rf"model\.mm_projector\.({'|'.join(index[name] for name in connector)})")
    return "|".join(f"({part})" for part in parts)


def _hf_targets(tensors: dict[str, torch.Tensor]) -> str:
    language, connector = _suffixes(tensors)
    parts = [rf".*language_model.*\.({'|'.join(language)})"] if language else []
    if connector:
        whole = connector == ["linear_1", "linear_2"]
        parts.append(CONNECTOR_TARGETS if whole else rf".*multi_modal_projector\.{connector[0]}")
    return parts[0] if len(parts) == 1 else "|".join(f"({part})" for part in parts)


def _keep_record(folder: Path, aside: Path, rename: Callable[[str], str]) -> None:
    masks = read_tensors(folder / MASKS_FILE, optional=True)
    if masks:
        save_tensors(aside / MASKS_FILE, {rename(key): mask for key, mask in masks.items()})
    copy_run(folder, aside, converted={"from": str(folder), "versions": versions()})
