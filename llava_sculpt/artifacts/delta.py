"""The change an adapter makes to each weight, as one sparse file that goes on and off a loaded model in place.

Layout (safetensors, `"format_version": "llava_sculpt.delta.v1"`): for every adapted weight NAME (in-memory name) the
support of BA as `NAME.kept` (coded as in sparse.py) and scaling BA on it as `NAME.values`; the trained connector whole
as `replace:NAME`; metadata `shapes` (JSON), `base` (path and fingerprint, JSON), `versions` (JSON),
`sha256` of all the rest (`sparse.content_sha256`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from llava_sculpt.artifacts.merge import bits, open_adapter
from llava_sculpt.artifacts.sparse import (
    Shapes,
    content_sha256,
    metadata_value,
    pack_mask,
    read_with_metadata,
    unpack_mask,
)
from llava_sculpt.artifacts.writing import check_no_file, in_memory, write_export
from llava_sculpt.errors import UserError
from llava_sculpt.model.shards import Stored
from llava_sculpt.records import versions

VERSION = "llava_sculpt.delta.v1"
_REPLACE = "replace:"
_Base = dict[Literal["path", "fingerprint"], str]


def export_delta(folder: Path, file: Path, base: str | None = None, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Write the sparse delta of every weight an adapter changes, one weight in memory at a time.

    Args:
        base: base checkpoint, if not the one the adapter names.
        dtype: of the values (default float32).

    Returns:
        `entries` and kept `support` of the adapted weights.

    Raises:
        UserError: DoRA (its change is dense), or what merging would refuse; `file` exists or cannot be written.
    """
    check_no_file(file)
    checkpoint, updates, connector = open_adapter(folder, base)
    if any(update.magnitude is not None for update in updates.values()):
        raise UserError(f"{folder}: DoRA changes every entry of a weight, so there is no sparse delta; merge it")
    if connector.keys() & updates.keys():
        raise UserError(f"{folder}: the connector is trained and has LoRA as well; merge it")
    target = dtype or torch.float32
    stored: list[Stored] = []
    support = 0
    for name, update in updates.items():
        mask = update.support()
        packed, kept = pack_mask(mask), int(mask.sum())
        support += kept
        stored.append(Stored(f"{name}.kept", tuple(packed.shape), torch.uint8, lambda p=packed: p))  # type: ignore[misc]
        stored.append(
            Stored(f"{name}.values", (kept,), target, lambda u=update: u.delta()[u.support()].to(target))  # type: ignore[misc]
        )
    stored += in_memory({_REPLACE + name: value for name, value in connector.items()})
    metadata = {
        "format_version": VERSION,
        "shapes": json.dumps({name: list(update.shape) for name, update in updates.items()}),
        "base": json.dumps({"path": base or str(checkpoint.path), "fingerprint": checkpoint.fingerprint()}),
        "versions": json.dumps(versions()),
    }
    write_export(file, stored, metadata | {"sha256": content_sha256(metadata, stored)})
    return {"entries": sum(torch.Size(update.shape).numel() for update in updates.values()), "support": support}


class SparseDelta:
    """A task's change of the weights, applied to and removed from a loaded model without loading it again.

        model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
        task = SparseDelta.load("iconqa.delta.safetensors")
        task.apply(model)
        ...
        task.remove(model)      # bit for bit what it was

    Removal is exact because the overwritten values are kept (as many as the delta has, in the model's dtype, on its
    device); subtracting again would leave rounding errors. A delta knows the one model it is applied to; several
    may lie on one model and come off in reverse order.

    Attributes:
        base: path and fingerprint of the base checkpoint it was made for.
    """

    def __init__(
        self,
        base: dict[str, str],
        shapes: dict[str, tuple[int, ...]],
        tensors: dict[str, torch.Tensor],
    ) -> None:
        self.base = base
        replaced = {n.removeprefix(_REPLACE): v for n, v in tensors.items() if n.startswith(_REPLACE)}
        self._shapes = shapes | {name: tuple(value.shape) for name, value in replaced.items()}
        self._tensors = tensors
        self._replaced = replaced
        self._model: nn.Module | None = None
        self._old: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, file: str | Path) -> SparseDelta:
        """Read a file of `llava-sculpt export --format delta`.

        Raises:
            UserError: missing, damaged, or another kind of file.
        """
        metadata, tensors = read_with_metadata(Path(file), VERSION)
        shapes = {name: tuple(shape) for name, shape in metadata_value(metadata, "shapes", Shapes, Path(file)).items()}
        delta = cls(metadata_value(metadata, "base", _Base, Path(file)), shapes, tensors)
        try:
            for name in shapes:
                if tensors[f"{name}.values"].shape != (int(delta._mask(name).sum()),):
                    raise ValueError(f"{name}: as many values as kept entries are needed")
        except (KeyError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error})") from error
        return delta

    def apply(self, model: nn.Module) -> None:
        """Change the model's weights in place; each is computed in float32 and rounded once, as `merge` does.

        Raises:
            RuntimeError: this delta is applied already.
            ValueError: the model lacks a weight, or has it in another shape; nothing has been changed.
        """
        if self._model is not None:
            raise RuntimeError("this delta is applied already; remove it first")
        with torch.no_grad():
            for name, weight in self._weights(model).items():
                mask = self._mask(name).to(weight.device)
                self._old[name] = weight[mask]
                weight[mask] = self._new(name)
        self._model = model

    def remove(self, model: nn.Module) -> None:
        """Put back every value, bit for bit.

        Raises:
            RuntimeError: it is not applied to this model, or a weight was changed since; nothing has been changed.
        """
        if model is not self._model:
            raise RuntimeError("this delta is not applied to this model")
        masked = {name: (weight, self._mask(name).to(weight.device)) for name, weight in self._weights(model).items()}
        for name, (weight, mask) in masked.items():
            if not torch.equal(bits(weight.detach()[mask]), bits(self._new(name))):
                raise RuntimeError(f"{name} was changed since; remove what was applied later first")
        with torch.no_grad():
            for name, (weight, mask) in masked.items():
                weight[mask] = self._old[name]
        self._old.clear()
        self._model = None

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        own = dict(model.named_parameters())
        odd = [n for n, shape in self._shapes.items() if n not in own or tuple(own[n].shape) != shape]
        if odd:
            raise ValueError(f"{len(odd)} weights are not in this model, or of another shape, such as {odd[0]}")
        return {name: own[name] for name in self._shapes}

    def _mask(self, name: str) -> torch.Tensor:
        if name in self._replaced:
            return torch.ones(self._shapes[name], dtype=torch.bool)
        return unpack_mask(self._tensors[f"{name}.kept"], self._shapes[name])

    def _new(self, name: str) -> torch.Tensor:
        old = self._old[name]
        if name in self._replaced:
            return self._replaced[name].flatten().to(old)
        return (old.float() + self._tensors[f"{name}.values"].to(old.device).float()).to(old.dtype)
