"""SRR (Eq. 2-3): which entries of a LoRA matrix survive, and keeping the others at zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    if kept == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    threshold = magnitude.topk(kept, sorted=False).values.min()
    mask = magnitude > threshold
    ties = (magnitude == threshold).nonzero().squeeze(1)  # ascending flat indices
    mask[ties[: kept - int(mask.sum())]] = True
    return mask.view(x.shape)


def make_masks(tensors: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """One ``magnitude_mask`` per tensor (A and B of every layer ranked separately), under the same names.

    The result is a plain dictionary of bool tensors: ``safetensors.torch.save_file`` stores it as it is.
    Raises ValueError like ``magnitude_mask``, naming the tensor.
    """
    masks = {}
    for name, tensor in tensors.items():
        try:
            masks[name] = magnitude_mask(tensor, density)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return masks


@torch.no_grad()
def apply_masks_(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every masked-out entry to exactly 0, in place (``B * M_B``, ``A * M_A``); NaN there becomes 0 too.

    ``tensors`` may be parameters, gradients or optimizer moments. Raises ValueError, before anything is
    changed, unless both hold the same names and shapes: a mask silently not applied trains a dense model.
    """
    problems = [f"{name}: no mask" for name in tensors if name not in masks]
    problems += [f"{name}: mask without a tensor" for name in masks if name not in tensors]
    problems += [
        f"{name}: tensor {tuple(tensor.shape)}, mask {tuple(masks[name].shape)}"
        for name, tensor in tensors.items()
        if name in masks and tensor.shape != masks[name].shape
    ]
    if problems:
        raise ValueError("masks do not fit the tensors: " + "; ".join(problems))
    for name, tensor in tensors.items():
        tensor.masked_fill_(~masks[name].to(tensor.device), 0)
