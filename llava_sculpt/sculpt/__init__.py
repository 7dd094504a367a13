"""LoRASculpt, the method: PyTorch, knowing LoRA pairs (A, B, W) and nothing of models or trainers.

``masks``: which entries survive (SRR). ``retention`` and ``cmr``: the regularizer (RKH); ``fused``: its GPU kernels;
``partitioned``: the same where W lies in pieces over the processes. ``schedule``: Algorithm 1. ``theory``: the density
theorems. docs/method.md has the table from equations to functions.
"""

from llava_sculpt.sculpt.cmr import (
    Norm,
    conflict_penalty,
    conflict_terms,
    matrices_at_once,
    penalties_and_gradients,
    penalty_and_gradients,
    prepared_penalty,
    runs_in_groups,
)
from llava_sculpt.sculpt.masks import kept_count, largest_entries, magnitude_mask
from llava_sculpt.sculpt.partitioned import WeightPiece, partitioned_penalties, partitioned_retentions
from llava_sculpt.sculpt.retention import Retention, frobenius_norm, retention_mask
from llava_sculpt.sculpt.schedule import SculptSchedule
from llava_sculpt.sculpt.theory import density, density_tail_bound, expected_density, product_density

__all__ = [
    "Norm",
    "Retention",
    "SculptSchedule",
    "WeightPiece",
    "conflict_penalty",
    "conflict_terms",
    "density",
    "density_tail_bound",
    "expected_density",
    "frobenius_norm",
    "kept_count",
    "largest_entries",
    "magnitude_mask",
    "matrices_at_once",
    "partitioned_penalties",
    "partitioned_retentions",
    "penalties_and_gradients",
    "penalty_and_gradients",
    "prepared_penalty",
    "product_density",
    "retention_mask",
    "runs_in_groups",
]
