"""LoRASculpt, the method: pure torch, knowing LoRA pairs (A, B, W) and nothing of models or trainers.

``masks``: which entries survive (SRR). ``retention`` and ``cmr``: the regularizer (RKH). ``schedule``:
Algorithm 1. ``theory``: the density theorems. docs/method.md has the table from equations to functions.
"""

from llava_sculpt.sculpt.cmr import (
    Norm,
    conflict_penalty,
    conflict_penalty_total,
    conflict_terms,
    prepared_penalty,
)
from llava_sculpt.sculpt.masks import kept_count, magnitude_mask
from llava_sculpt.sculpt.retention import Retention, frobenius_norm, retention_mask
from llava_sculpt.sculpt.schedule import SculptSchedule
from llava_sculpt.sculpt.theory import density, density_tail_bound, expected_density, product_density

__all__ = [
    "Norm",
    "Retention",
    "SculptSchedule",
    "conflict_penalty",
    "conflict_penalty_total",
    "conflict_terms",
    "density",
    "density_tail_bound",
    "expected_density",
    "frobenius_norm",
    "kept_count",
    "magnitude_mask",
    "prepared_penalty",
    "product_density",
    "retention_mask",
]
