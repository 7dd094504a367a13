"""A base checkpoint rewritten weight by weight: any change of single weights, and merging an adapter into its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_sculpt.artifacts.open import open_base_of
from llava_sculpt.artifacts.writing import LLAVA_FILES, SIDE_FILES, check_new, copy_files, write_folder
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import check_base, check_changes, read_adapter
from llava_sculpt.model.checkpoint import BaseCheckpoint
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE
from llava_sculpt.model.layout import LANGUAGE, PROJECTOR, memory_name
from llava_sculpt.model.processor import write_processor
from llava_sculpt.model.shards import Stored, model_tensors, stored_tensors, weight_files
from llava_sculpt.records import file_sha256, versions, write_json

MERGE_FILE = "merge.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def rewrite_checkpoint(
    checkpoint: BaseCheckpoint,
    out: Path,
    change: Change,
    dtype: torch.dtype | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Copy a base checkpoint to `out`, shard by shard, with some of its weights changed; one tensor in memory.

    Names on disk, shards and config.json stay those of the base (PyTorch's .bin shards become safetensors), other
    files as well, except for the processor of a LLaVA (`write_processor`).

    Args:
        change: is given a weight's in-memory name (`model.language_model.layers.0.self_attn.q_proj.weight`) and its
            value, on the CPU in the dtype of the base; returns the new value (same shape, any floating dtype), or
            None to keep the weight's bytes.
        dtype: cast every floating weight to this dtype (default: each keeps its own).
        finish: called with the hidden folder before it is published, to add files or to check what was written.

    Raises:
        UserError: `out` is not empty, the disk is too full or fills up, or a shard of the base is damaged.
    """
    files = {
        _written_name(file): [_changed(tensor, change, dtype) for tensor in stored_tensors(file)]
        for file in weight_files(checkpoint.path)
    }

    def end(folder: Path) -> None:
        is_llava = checkpoint.config.get("model_type") == "llava"
        copy_files(checkpoint.path, folder, LLAVA_FILES if is_llava else SIDE_FILES)
        write_json(folder / "config.json", config_with_dtype(checkpoint.config, dtype))
        if is_llava:
            write_processor(folder, checkpoint.config)
        if finish is not None:
            finish(folder)

    write_folder(out, files, end)


def _written_name(file: Path) -> str:
    return file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _changed(tensor: Stored, change: Change, dtype: torch.dtype | None) -> Stored:
    target = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype

    def load() -> torch.Tensor:
        weight = tensor.load()
        new = change(memory_name(tensor.name), weight)
        return (weight if new is None else new).to(target)

    return Stored(tensor.name, tensor.shape, target, load)


def config_with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A copy of a config.json that names `dtype`, in whichever of its two spellings (and parts) it names one."""
    copied: dict[str, Any] = json.loads(json.dumps(config))
    if dtype is not None:
        for part in (copied, copied.get("text_config"), copied.get("vision_config")):
            for key in ("dtype", "torch_dtype"):
                if isinstance(part, dict) and key in part:
                    part[key] = str(dtype).removeprefix("torch.")
    return copied


@dataclass(frozen=True)
class WeightUpdate:
    """What an adapter does to one weight W (p, q): W + scaling BA, with DoRA m (W + scaling BA) / its row norms.

    Attributes:
        magnitude: DoRA's m (p,), None without DoRA.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(p, q)"""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def delta(self) -> torch.Tensor:
        """scaling BA (p, q), float32."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scaling

    def support(self) -> torch.Tensor:
        """Where an entry of BA can differ from 0 (p, q), bool: the product of the patterns of B and A."""
        if self.magnitude is not None:
            return torch.ones(self.shape, dtype=torch.bool)
        return (self.lora_B != 0).float() @ (self.lora_A != 0).float() > 0

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight in float32; entries off the support keep their value and sign of zero."""
        whole = weight.float()
        merged = whole + self.delta()
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
            return self.magnitude.float().reshape(-1, 1) / norm * merged
        return torch.where(self.support(), merged, whole)


def weight_updates(folder: Path) -> tuple[dict[str, WeightUpdate], dict[str, torch.Tensor]]:
    """What an adapter folder changes.

    Returns:
        Updates by in-memory name of the weight, and the connector's trained weights, which replace the base's.

    Raises:
        UserError: as `read_adapter`; ranks or scales that differ between modules; a no-op.
    """
    saved = read_adapter(folder)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if saved.config.get(key)]
    if patterns:
        raise UserError([f"{folder / ADAPTER_CONFIG}: {key} cannot be merged" for key in patterns])
    check_changes(saved)
    updates = {
        f"{name}.weight": WeightUpdate(layer.lora_A, layer.lora_B, layer.scaling, layer.magnitude)
        for name, layer in saved.layers.items()
    }
    return updates, saved.connector


def open_adapter(
    folder: Path, base: str | None
) -> tuple[BaseCheckpoint, dict[str, WeightUpdate], dict[str, torch.Tensor]]:
    """The base of an adapter, any model, and what `weight_updates` says, checked against the base.

    Args:
        base: base checkpoint, if not the one the adapter names.

    Raises:
        UserError: as `weight_updates`; another base than the adapter's, every weight that it does not have so.
    """
    checkpoint = open_base_of(folder, base, any_model=True)
    check_base(folder, checkpoint)
    updates, connector = weight_updates(folder)
    shapes = {tensor.name: tensor.shape for tensor in model_tensors(checkpoint.path)}
    own = {name: update.shape for name, update in updates.items()}
    own |= {name: tuple(value.shape) for name, value in connector.items()}
    problems = [
        f"{folder}: {name} {list(shape)} does not fit {checkpoint.path}, which has "
        + (f"{list(shapes[name])} there" if name in shapes else "no such weight")
        for name, shape in own.items()
        if shapes.get(name) != shape
    ]
    if problems:
        raise UserError(problems)
    return checkpoint, updates, connector


def merge_adapter(folder: Path, out: Path, base: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Write base + adapter as a model that stock transformers and vLLM load, and prove what it changed.

    A weight is computed in float32 and rounded once, to the base's dtype or `dtype`. Before the folder is published
    everything written is compared, bit by bit, with the base (cast to `dtype` if given).

    Args:
        base: base checkpoint, if not the one the adapter names.
        dtype: bf16, fp16 or fp32.

    Returns:
        Content of merge.json: `base`, `adapter`, `versions`, and per module type under `changed` the numbers of
        `entries`, entries on the `support` of BA, and `changed` ones; all outside the support are identical.

    Raises:
        UserError: what `open_adapter` and `rewrite_checkpoint` say.
    """
    check_new(out)
    checkpoint, updates, connector = open_adapter(folder, base)
    target = None if dtype is None else DTYPES[dtype]
    record: dict[str, Any] = {
        "base": {"path": base or str(checkpoint.path), "fingerprint": checkpoint.fingerprint()},
        "adapter": {"path": str(folder), "sha256": file_sha256(folder / ADAPTER_FILE)},
        "dtype": dtype or "as the base",
        "versions": versions(),
    }

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if name in connector:
            weight = connector[name]
        elif name not in updates:
            return None
        return updates[name].apply(weight) if name in updates else weight

    def finish(written: Path) -> None:
        record["changed"] = _compare(checkpoint.path, written, updates, connector)
        write_json(written / MERGE_FILE, record)

    rewrite_checkpoint(checkpoint, out, change, target, finish)
    return record


def _compare(
    base: Path, written: Path, updates: dict[str, WeightUpdate], connector: dict[str, torch.Tensor]
) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for file in weight_files(base):
        for before, after in zip(stored_tensors(file), stored_tensors(written / _written_name(file)), strict=True):
            name = memory_name(before.name)
            different = bits(before.load().to(after.dtype)) != bits(after.load())
            if name in updates and name not in connector:
                support = updates[name].support()
            else:
                support = torch.full_like(different, name in connector)
            outside = int((different & ~support).count_nonzero())
            if outside:
                raise RuntimeError(f"{name}: {outside} entries off the support of BA are not those of the base")
            count = counts.setdefault(module_type(name), {"entries": 0, "support": 0, "changed": 0})
            count["entries"] += different.numel()
            count["support"] += int(support.sum())
            count["changed"] += int(different.sum())
    return counts


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A floating tensor's bits as integers, so that equal means identical (zeros of either sign, NaN)."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def module_type(name: str) -> str:
    """q_proj, ..., down_proj of the language model, connector, or the rest."""
    if name.startswith(PROJECTOR):
        return "connector"
    kind = name.split(".")[-2]
    in_llm = name.startswith((LANGUAGE, "model.layers."))  # the second: a language model alone
    return kind if in_llm and kind.endswith("_proj") else "everything else"


def format_merge(record: dict[str, Any]) -> str:
    """The counts of merge.json as a table."""
    counts = dict(record["changed"])
    rest = counts.pop("everything else")
    counts["everything else"] = rest
    counts["total"] = {key: sum(c[key] for c in counts.values()) for key in ("entries", "support", "changed")}
    lines = [f"{'weights':<16}{'entries':>15}{'on support of BA':>18}{'changed':>10}{'outside':>9}"]
    lines += [
        f"{kind:<16}{c['entries']:>15,}{c['support'] / c['entries']:>18.2%}{c['changed'] / c['entries']:>10.2%}{0:>9}"
        for kind, c in counts.items()
    ]
    lines.append("outside the support of BA every entry is, bit for bit, the base's")
    return "\n".join(lines)
