"""The files of a run's folder. Imports nothing that differs between versions of transformers and peft."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from llava_sculpt.errors import UserError
from llava_sculpt.records import check_regular, write_atomically

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
        UserError: missing, truncated or damaged, or a value that is NaN or infinite.
    """
    if optional and not os.path.lexists(file):
        return {}
    check_regular(file)
    try:
        tensors = load_file(str(file))
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error})") from error
    check_finite(tensors.items(), file)
    return tensors


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str | Path) -> None:
    """Refuse values that are no numbers: whatever is computed with them is wrong.

    Reads every value once and keeps none (0.3 s per GB on one CPU core).

    Raises:
        UserError: a NaN or infinite value; names the first tensor of those that have one.
    """
    odd = [name for name, tensor in tensors if not is_finite(tensor)]
    if odd:
        raise UserError(f"{source}: NaN or infinite values in {len(odd)} tensors, such as {odd[0]}")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; always so of integers and bool."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # no temporary; NaN wins over every number
    return bool(torch.isfinite(low) & torch.isfinite(high))


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file, whole or not there, with the permissions of the user's other files.

    (The library's own `save_file` makes files that only their owner can read.)

    Raises:
        UserError: a value that is NaN or infinite.
    """
    check_finite(tensors.items(), file)
    write_atomically(file, save(tensors, metadata={"format": "pt"}))
