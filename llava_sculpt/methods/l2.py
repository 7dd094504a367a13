"""L2-Reg: keep the factors of LoRA small, so that the model stays near the pretrained one."""

from __future__ import annotations

import torch
from torch import Tensor


def l2_penalty(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """One layer's ``||A||_F^2 + ||B||_F^2``.

    Args:
        lora_A: (r, q). lora_B: (p, r). Any float dtypes; differentiable in both.

    Returns:
        float32 scalar, summed in float64; the gradients are 2 A and 2 B.
    """
    return _square_sum(lora_A) + _square_sum(lora_B)


def _square_sum(x: Tensor) -> Tensor:
    return x.float().square().sum(dtype=torch.float64).float()
