"""Post-pruning (Fig. 1): of a trained LoRA matrix only the entries of largest magnitude stay."""

from __future__ import annotations

from torch import Tensor

from llava_sculpt.sculpt import magnitude_mask


def post_pruned(factor: Tensor, density: float) -> Tensor:
    """A trained A or B with its ``floor(density * numel)`` largest entries; the others are 0.

    Raises:
        ValueError: density not in (0, 1], or NaN in the matrix.
    """
    return factor.masked_fill(~magnitude_mask(factor, density), 0)
