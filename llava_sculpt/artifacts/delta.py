"""The change an adapter makes to each weight, as one sparse file that goes on and off a loaded model in place.

Layout (safetensors, `"format_version": "llava_sculpt.delta.v1"`): for every adapted weight NAME (in-memory name) the
support of BA as `NAME.kept` (coded as in sparse.py) and scaling BA on it as `NAME.values`; the trained connector whole
as `replace:NAME`; metadata `shapes` (JSON), `base` (path and fingerprint, JSON), `versions` (JSON).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_sculpt.artifacts.merge import bits, check_shapes, weight_updates
from llava_sculpt.artifacts.sparse import pack_mask, read_with_metadata, unpack_mask
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import base_of, check_base
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.layout import memory_name
from llava_sculpt.model.shards import Stored, stored_tensors, weight_files, write_safetensors
from llava_sculpt.records import versions

VERSION = "llava_sculpt.delta.v1"
_REPLACE = "replace:"


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
    if file.exists():
        raise UserError(f"{file}: exists; choose another name")
    checkpoint = find_base_checkpoint(base_of(folder, base))
    check_base(folder, checkpoint)
    updates, connector = weight_updates(folder)
    if any(update.magnitude is not None for update in updates.values()):
        raise UserError(f"{folder}: DoRA changes every entry of a weight, so there is no sparse delta; merge it")
    if connector.keys() & updates.keys():
        raise UserError(f"{folder}: the connector is trained and has LoRA as well; merge it")
    shapes = {memory_name(t.name): t.shape for f in weight_files(checkpoint.path) for t in stored_tensors(f)}
    check_shapes(folder, checkpoint, shapes, updates, connector)
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
    stored += [Stored(_REPLACE + n, tuple(v.shape), v.dtype, lambda v=v: v) for n, v in connector.items()]  # type: ignore[misc]
    metadata = {
        "format_version": VERSION,
        "shapes": json.dumps({name: list(shapes[name]) for name in updates}),
        "base": json.dumps({"path": base or str(checkpoint.path), "fingerprint": checkpoint.fingerprint()}),
        "versions": json.dumps(versions()),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(file, stored, metadata)
    except OSError as error:
        raise UserError(f"{file}: could not be written: {error}") from error
    return {"entries": sum(torch.Size(shapes[name]).numel() for name in updates), "support": support}


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
        self._shapes = shapes
        self._tensors = tensors
        self._replaced = {n.removeprefix(_REPLACE): v for n, v in tensors.items() if n.startswith(_REPLACE)}
        self._model: nn.Module | None = None
        self._old: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, file: str | Path) -> SparseDelta:
        """Read a file of `llava-sculpt export --format delta`.

        Raises:
            UserError: missing, damaged, or another kind of file.
        """
        metadata, tensors = read_with_metadata(Path(file), VERSION)
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        delta = cls(json.loads(metadata["base"]), shapes, tensors)
        try:
            for name in shapes:
                if int(delta._mask(name).sum()) != tensors[f"{name}.values"].numel():
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
        weights = self._weights(model)
        with torch.no_grad():
            for name, weight in weights.items():
                if name in self._replaced:
                    self._old[name] = weight.detach().clone()
                    weight.copy_(self._replaced[name])
                    continue
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
        weights = self._weights(model)
        for name, weight in weights.items():
            if name in self._replaced:
                now, expected = weight.detach(), self._replaced[name].to(weight)
            else:
                now, expected = weight.detach()[self._mask(name).to(weight.device)], self._new(name)
            if not torch.equal(bits(now), bits(expected)):
                raise RuntimeError(f"{name} was changed since; remove what was applied later first")
        with torch.no_grad():
            for name, weight in weights.items():
                if name in self._replaced:
                    weight.copy_(self._old[name])
                else:
                    weight[self._mask(name).to(weight.device)] = self._old[name]
        self._old.clear()
        self._model = None

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        own = dict(model.named_parameters())
        wanted: dict[str, Any] = {**self._shapes, **{name: tuple(v.shape) for name, v in self._replaced.items()}}
        odd = [name for name, shape in wanted.items() if name not in own or tuple(own[name].shape) != shape]
        if odd:
            raise ValueError(f"{len(odd)} weights are not in this model, or of another shape, such as {odd[0]}")
        return {name: own[name] for name in wanted}

    def _mask(self, name: str) -> torch.Tensor:
        return unpack_mask(self._tensors[f"{name}.kept"], self._shapes[name])

    def _new(self, name: str) -> torch.Tensor:
        old = self._old[name]
        return (old.float() + self._tensors[f"{name}.values"].to(old.device).float()).to(old.dtype)
