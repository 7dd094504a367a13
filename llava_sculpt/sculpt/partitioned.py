"""CMR when every frozen W lies in pieces over the processes (ZeRO-3): each works on its own piece, W is never whole.

A piece is a run of the row-major flattened W. Its rectangles contribute to the value and to both gradients like any
block (`conflict_terms`); one sum over the processes, of a vector with one number per matrix, completes the norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from llava_sculpt.sculpt.cmr import Norm, conflict_terms, power_of_two_below
from llava_sculpt.sculpt.retention import Retention, frobenius_norm


@dataclass(frozen=True)
class WeightPiece:
    """One process's part of W (p, q).

    Attributes:
        flat: (n,), entries start to start + n of W flattened row by row, on any device; n may be 0.
        start: index of the first entry.
        shape: (p, q).
    """

    flat: Tensor
    start: int
    shape: tuple[int, int]

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, block) of at most three rectangles: the end of a row, whole rows, the start of a row."""
        columns = self.shape[1]
        done = 0
        while done < self.flat.numel():
            row, column = divmod(self.start + done, columns)
            left = self.flat.numel() - done
            height, width = (left // columns, columns) if column == 0 and left >= columns else (1, 0)
            width = width or min(columns - column, left)
            block = self.flat[done : done + height * width].view(height, width)
            yield slice(row, row + height), slice(column, column + width), block
            done += height * width


def partitioned_retentions(
    pieces: Sequence[WeightPiece], omega: float, device: torch.device, group: dist.ProcessGroup | None = None
) -> list[Retention]:
    """What of M outlives a step, for each matrix, from the norms of the pieces. Collective over ``group``.

    Args:
        device: where the pieces will be worked on.

    Raises:
        ValueError: on every process, when any piece holds inf or NaN.
    """
    squares = torch.tensor([_norm_or_nan(piece.flat) ** 2 for piece in pieces], dtype=torch.float64, device=device)
    _sum_over(squares, group)
    if not squares.isfinite().all():
        raise ValueError(f"the weight of matrix {int((~squares.isfinite()).nonzero()[0])} holds inf or NaN")
    return [
        Retention(math.sqrt(square), piece.flat.dtype, device, omega)
        for square, piece in zip(squares.tolist(), pieces, strict=True)
    ]


def partitioned_penalties(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    pieces: Sequence[WeightPiece],
    retentions: Sequence[Retention],
    norm: Norm = "fro",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``|| M * (B A) ||`` of n matrices (Eq. 8: "fro", Eq. 10: "l1"). Collective over ``group``.

    Args:
        lora_A: n times (r, q). lora_B: n times (p, r). Whole on every process, and the same.
        pieces, retentions: of the n matrices W; the pieces of all processes together are W.

    Returns:
        float32 (n,), the same on every process. The gradients are this process's share times the number of
        processes: their mean over the processes, which data-parallel training takes, is the gradient.

    Raises:
        ValueError: shapes that do not fit.
    """
    for a, b, piece in zip(lora_A, lora_B, pieces, strict=True):
        if (b.shape[0], a.shape[1]) != piece.shape or b.shape[1] != a.shape[0]:
            raise ValueError(f"expected A (r, q), B (p, r): A {tuple(a.shape)}, B {tuple(b.shape)}, W {piece.shape}")
    return _PartitionedPenalties.apply(pieces, retentions, norm, group, *lora_A, *lora_B)


class _PartitionedPenalties(torch.autograd.Function):
    """All matrices in one function, because the norms are completed by one collective."""

    @staticmethod
    def forward(
        ctx: Any,
        pieces: Sequence[WeightPiece],
        retentions: Sequence[Retention],
        norm: Norm,
        group: dist.ProcessGroup | None,
        *factors: Tensor,
    ) -> Tensor:
        lora_A, lora_B = factors[: len(pieces)], factors[len(pieces) :]
        values, units, grads_A, grads_B = [], [], [], []
        for A, B, piece, retention in zip(lora_A, lora_B, pieces, retentions, strict=True):
            unit_A, unit_B = power_of_two_below(A), power_of_two_below(B)  # the reason is in cmr.py
            value, grad_A, grad_B = _terms(A.float() / unit_A, B.float() / unit_B, piece, retention, norm)
            values.append(value)
            units.append(unit_A * unit_B)
            grads_A.append(grad_A.mul_(unit_B))
            grads_B.append(grad_B.mul_(unit_A))
        total = torch.stack(values)
        processes = _sum_over(total, group)
        total.clamp_(min=0)
        slopes = torch.full_like(total, processes)
        if norm == "fro":
            total.sqrt_()
            slopes = torch.where(total > 0, processes / total, 0)
        for slope, grad_A, grad_B in zip(slopes.float(), grads_A, grads_B, strict=True):
            grad_A.mul_(slope)
            grad_B.mul_(slope)
        ctx.save_for_backward(*grads_A, *grads_B)
        ctx.dtypes = [factor.dtype for factor in factors]
        return (total * torch.stack(units)).float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("CMR can be differentiated only once: call backward without create_graph=True")
        slopes = [*grad_output, *grad_output]
        grads = [
            (slope * grad).to(dtype) for slope, grad, dtype in zip(slopes, ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *grads


def _terms(A: Tensor, B: Tensor, piece: WeightPiece, retention: Retention, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """`conflict_terms` of one piece, as parts of the whole matrix's."""
    value = torch.zeros((), dtype=torch.float64, device=A.device)
    grad_A, grad_B = torch.zeros_like(A), torch.zeros_like(B)
    for rows, columns, block in piece.blocks():
        terms = conflict_terms(A[:, columns], B[rows], block.to(A.device), retention, norm)
        value += terms[0]
        grad_A[:, columns] += terms[1]
        grad_B[rows] += terms[2]
    return value, grad_A, grad_B


def _norm_or_nan(flat: Tensor) -> float:
    """An error on one process alone would leave the others waiting in the collective."""
    try:
        return frobenius_norm(flat)
    except ValueError:
        return math.nan


def _sum_over(values: Tensor, group: dist.ProcessGroup | None) -> int:
    """Add up over the processes, in place; returns their number."""
    if not dist.is_initialized():
        return 1
    dist.all_reduce(values, group=group)
    return dist.get_world_size(group)
