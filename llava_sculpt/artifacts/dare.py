"""DARE (drop and rescale): a random part of the delta is dropped, the rest grows so that the expectation stays."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import torch
from peft.utils.merge_utils import random_pruning
from torch import Tensor

from llava_sculpt.artifacts.edit import Base, check_settings, write_record
from llava_sculpt.artifacts.merge import open_adapter, rewrite_checkpoint


def dare(
    adapter: Path,
    out: Path,
    *,
    # The DARE paper: 90 % of a fine-tuned model's delta can go; LoRASculpt's paper does not say.
    drop: Annotated[float, "probability that an entry is dropped"] = 0.9,
    seed: Annotated[int, "of the random choice"] = 42,
    base: Base = None,
) -> None:
    """Drop entries of the delta at random, rescale the rest -> a merged model.

    A fully fine-tuned connector is taken over as it is trained.

    Args:
        drop: in [0, 1).

    Raises:
        UserError: not an adapter or of another base, drop out of range, `out` not empty or not writable.
    """
    check_settings("dare", drop=drop)
    checkpoint, updates, connector = open_adapter(adapter, base)

    def change(name: str, weight: Tensor) -> Tensor | None:
        if name not in updates:
            return connector.get(name)
        update, whole = updates[name], weight.float()
        delta = update.delta() if update.magnitude is None else update.apply(weight) - whole
        return whole + dropped_delta(delta, drop, seed, name)

    def finish(folder: Path) -> None:
        write_record(folder, adapter, "dare", {"drop": drop, "seed": seed})

    rewrite_checkpoint(checkpoint, out, change, finish=finish)


def dropped_delta(delta: Tensor, drop: float, seed: int, name: str) -> Tensor:
    """Each entry of ``delta`` is 0 with probability ``drop``, else divided by ``1 - drop``.

    Args:
        delta: (p, q), float, on the CPU.
        drop: in [0, 1).
        name: of the layer. What is dropped depends on it, the seed and the shape alone: not on the order of layers.
    """
    own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.manual_seed(own)
        return random_pruning(delta, density=1 - drop, rescale=True)
