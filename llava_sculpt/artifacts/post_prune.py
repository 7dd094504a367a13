"""Post-pruning (Fig. 1): of trained LoRA matrices only the entries of largest magnitude stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from llava_sculpt.artifacts.edit import check_settings, write_record
from llava_sculpt.artifacts.writing import publish
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import read_adapter
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, write_tensors
from llava_sculpt.model.lora import CONNECTOR
from llava_sculpt.model.whole import copy_run
from llava_sculpt.sculpt import magnitude_mask


def post_prune(adapter: Path, out: Path, *, density: Annotated[float, "fraction of entries kept"] = 0.1) -> None:
    """The largest entries of trained A and B -> an adapter.

    The connector's LoRA or weights, DoRA's magnitudes and run.json stay as they are.

    Args:
        density: of each matrix, in (0, 1].

    Raises:
        UserError: not an adapter, a density out of range, `out` not empty or not writable.
    """
    check_settings("post_prune", density=density)
    tensors = read_adapter(adapter).tensors
    try:
        pruned = {
            key: value.masked_fill(~magnitude_mask(value, density), 0)
            if value.ndim == 2 and CONNECTOR not in key
            else value
            for key, value in tensors.items()
        }
    except ValueError as error:
        raise UserError(f"{adapter / ADAPTER_FILE}: {error}") from error

    def write(folder: Path) -> None:
        write_tensors(folder / ADAPTER_FILE, pruned)
        for name in (ADAPTER_CONFIG, CONNECTOR_FILE):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
        write_record(folder, adapter, "post_prune", {"density": density})
        copy_run(adapter, folder)

    publish(out, write)
