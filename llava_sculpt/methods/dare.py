"""DARE (drop and rescale): a random part of the delta is dropped, the rest grows so that the expectation stays."""

from __future__ import annotations

import hashlib

import torch
from peft.utils.merge_utils import random_pruning
from torch import Tensor

DROP = 0.9  # the DARE paper: 90 % of a fine-tuned model's delta can go; LoRASculpt's paper does not say


def dropped_delta(delta: Tensor, drop: float, seed: int, name: str) -> Tensor:
    """Each entry of ``delta`` is 0 with probability ``drop``, else divided by ``1 - drop``.

    Args:
        delta: (p, q), float, on the CPU.
        name: of the layer. What is dropped depends on it, the seed and the shape alone: not on the order of layers.

    Raises:
        ValueError: drop not in [0, 1).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.manual_seed(own)
        return random_pruning(delta, density=1 - drop, rescale=True)
