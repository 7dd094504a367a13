"""SRR (Eq. 2-3): which entries of a LoRA matrix survive."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def kept_count(numel: int, density: float) -> int:
    """Number of entries Eq. 3 keeps: exactly ``floor(density * numel)``.

    ``density`` (the paper's "sparsity" s) is read as the decimal number it prints as, so that 0.29 of 100
    entries is 29, although the product of the two floats is 28.999999999999996.

    Raises ValueError unless 0 < density <= 1.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return math.floor(Fraction(str(float(density))) * numel)


def magnitude_mask(x: Tensor, density: float) -> Tensor:
    """Mask of the largest entries of ``x`` by magnitude (Eq. 3).

    Args:
        x: any shape, any real float dtype, any device.
        density: fraction of entries to keep, in (0, 1].

    Returns:
        Bool tensor of the shape and on the device of ``x`` with exactly ``floor(density * x.numel())`` True
        entries. Among equal magnitudes the lowest flat index is kept. Only exact comparisons are made, so
        equal inputs give equal masks on every device and rank.

    Raises:
        ValueError: density out of range, NaN in ``x``, or ``x`` empty (a ZeRO-3 parameter not gathered).
    """
    kept = kept_count(x.numel(), density)
    if x.numel() == 0:
        raise ValueError("cannot mask an empty tensor (a ZeRO-3 parameter must be gathered first)")
    magnitude = x.detach().flatten().abs()
    if magnitude.element_size() < 4:
        magnitude = magnitude.float()  # exact, and many selection kernels exist only from 32 bits on
    if magnitude.isnan().any():
        raise ValueError("cannot rank magnitudes: the tensor holds NaN")
    return largest_entries(magnitude, kept).view(x.shape)


def largest_entries(values: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of ``values`` (n,), free of NaN; among equals those of lowest index."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.topk(count, sorted=False).values.min()
    mask = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)  # ascending
    mask[ties[: count - int(mask.sum())]] = True
    return mask
