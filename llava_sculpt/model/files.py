"""The files of a run's folder. Imports nothing that differs between versions of transformers and peft."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from llava_sculpt.errors import UserError
from llava_sculpt.records import write_atomically

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
CONNECTOR_FILE = "connector.safetensors"
MASKS_FILE = "sculpt_masks.safetensors"
RUN_FILE = "run.json"
COMPLETE_FILE = "complete.json"  # of a checkpoint: {relative file name: sha256}
# What the original LLaVA package writes in their place.
PICKLED_ADAPTER = "adapter_model.bin"
NON_LORA_FILE = "non_lora_trainables.bin"


def read_tensors(file: Path, *, optional: bool = False) -> dict[str, torch.Tensor]:
    """Read one safetensors file.

    Args:
        optional: a missing file holds nothing.

    Raises:
        UserError: missing, truncated or damaged.
    """
    if optional and not file.is_file():
        return {}
    try:
        return load_file(str(file))
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error})") from error


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file, whole or not there, with the permissions of the user's other files.

    (The library's own `save_file` makes files that only their owner can read.)
    """
    write_atomically(file, save(tensors, metadata={"format": "pt"}))
