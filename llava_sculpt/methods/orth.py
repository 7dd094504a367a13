"""Orth-Reg (the preserve term of PEGO): features of the update orthogonal to those of the pretrained weight.

    N = || W^T B A ||_F        with X = W^T B (q x r):  N^2 = tr((X^T X)(A A^T)), two r x r Gram matrices

    dN/dA = (X^T X) A / N      dN/dB = W (X (A A^T)) / N

W is read twice in row tiles, for X and for dN/dB; nothing larger than a tile of W, A and B is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_sculpt.sculpt.cmr import full_float32


def orth_penalty(lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> Tensor:
    """One layer's ``|| W^T B A ||_F``.

    Args:
        lora_A: (r, q). lora_B: (p, r). Any float dtypes; differentiable in both, once.
        weight: (p, q), frozen, any float dtype; no gradient flows to it.

    Returns:
        float32 scalar. Products with W run in float32 whatever the dtypes, also under autocast and with TF32
        enabled; the Gram matrices are float64. Both gradients are exactly 0 where the norm is 0 (at B = 0, the
        start of training, it has none).

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: in a backward pass with create_graph=True.
    """
    if weight.ndim != 2 or weight.shape != (lora_B.shape[0], lora_A.shape[-1]) or lora_B.shape[1:] != lora_A.shape[:1]:
        shapes = f"A {tuple(lora_A.shape)}, B {tuple(lora_B.shape)}, W {tuple(weight.shape)}"
        raise ValueError(f"expected A (r, q), B (p, r), W (p, q): {shapes}")
    return _OrthPenalty.apply(lora_A, lora_B, weight)


class _OrthPenalty(torch.autograd.Function):
    """N with its gradients computed in the forward pass, so that W, maybe a dequantised copy, is not kept."""

    @staticmethod
    def forward(ctx: Any, lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> Tensor:
        tile_rows = 128 if weight.device.type == "cpu" else 1024
        with full_float32(weight.device.type):
            A, B = lora_A.float(), lora_B.float()
            X = A.new_zeros(A.shape[1], A.shape[0])
            for rows_W, rows_B in zip(weight.split(tile_rows), B.split(tile_rows), strict=True):
                X.addmm_(rows_W.float().T, rows_B)
            # In float64 the Gram matrices lose nothing of N that X still has, even where X A nearly cancels.
            gram_X, gram_A = _gram(X), _gram(A.T)
            value = (gram_X * gram_A).sum().clamp_(min=0).sqrt_()
            slope = torch.where(value > 0, value.reciprocal(), 0)
            grad_A = (gram_X * slope).float() @ A
            toward_B = X @ (gram_A * slope).float()
            grad_B = torch.cat([rows_W.float() @ toward_B for rows_W in weight.split(tile_rows)])
        ctx.save_for_backward(grad_A, grad_B)
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        return value.float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients below would pass for constants in silence
            raise RuntimeError("Orth-Reg can be differentiated only once: call backward without create_graph=True")
        grad_A, grad_B = ctx.saved_tensors
        dtype_A, dtype_B = ctx.dtypes
        return (grad_output * grad_A).to(dtype_A), (grad_output * grad_B).to(dtype_B), None


def _gram(x: Tensor) -> Tensor:
    wide = x.double()
    return wide.T @ wide
