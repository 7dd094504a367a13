"""Model Tailor: keep the fine-tuned entries that matter, restore the rest, let the kept ones make up for it.

For one linear layer with pretrained and fine-tuned weights W_pre and W_ft (p, q) and n calibration inputs X (q, n):

    H     = 2/n X X^T, damped: 0.01 mean(diag H) is added to its diagonal
    score = 0.5 z(|W_ft - W_pre|) + 0.5 z(W_ft^2 / [H^-1]_jj^2)      z: standard scores within a block of rows
    keep  the best-scored entries of the layer (10 %); every other entry goes back to W_pre
    kept  entries of a row move by -H_KK^-1 (H d)_K, with d what restoring did to the row: the optimal-brain-surgeon
          update for all restored entries at once, the minimum of ||(W_new - W_ft) X|| over the kept entries
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_sculpt.sculpt import kept_count, largest_entries
from llava_sculpt.sculpt.cmr import full_float32

DAMPING = 0.01
BLOCK_ROWS = 128  # rows whose scores are standardised together
_SOLVED_ENTRIES = 1 << 25  # of the H_KK of the rows that are solved together (128 MB in float32)


class InputHessian:
    """H of one layer's inputs, added up input by input in float32 (float64 inputs: in float64)."""

    def __init__(self) -> None:
        self.inputs = 0
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take inputs in: (..., q), any float dtype."""
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self._sum is None:
            self._sum = rows.new_zeros(rows.shape[1], rows.shape[1])
        with full_float32(rows.device.type):
            self._sum.addmm_(rows.T, rows)
        self.inputs += len(rows)

    def value(self) -> Tensor:
        """H (q, q), not damped. ValueError if nothing was added."""
        if self._sum is None:
            raise ValueError("no calibration inputs")
        return self._sum * (2 / self.inputs)


@dataclass(frozen=True)
class Tailored:
    """What became of one layer.

    Attributes:
        weight: W_new (p, q), in the working precision.
        kept: bool (p, q), False where W_new is W_pre.
        error: ||(W_new - W_ft) X||_F / sqrt(n) on the calibration inputs.
        plain_error: the same had the kept entries stayed as they were fine-tuned.
    """

    weight: Tensor
    kept: Tensor
    error: float
    plain_error: float


def tailor(w_pre: Tensor, w_ft: Tensor, hessian: Tensor, keep: float, *, compensate: bool = True) -> Tailored:
    """One layer of Model Tailor.

    Args:
        w_pre, w_ft: (p, q), float32 or float64, on one device. hessian: (q, q), not damped, of the same dtype.
        keep: fraction of fine-tuned entries that stay, in (0, 1].
        compensate: False leaves kept entries as they are.

    Raises:
        ValueError: keep out of range, or inf or NaN in the weights or the inputs.
    """
    with torch.no_grad(), full_float32(w_ft.device.type):
        if not (hessian.isfinite().all() and w_ft.isfinite().all()):
            raise ValueError("inf or NaN in the weights or their inputs")
        damped = damp(hessian)
        score = scores(w_pre, w_ft, damped)
        kept = largest_entries(score.flatten(), kept_count(score.numel(), keep)).view(score.shape)
        restored = torch.where(kept, 0, w_pre - w_ft)
        plain_error = _error(restored, hessian)
        change, error = restored, plain_error
        if compensate:
            change = restored + _compensation(restored, kept, damped)
            error = _error(change, hessian)
        # Not w_ft + change: what is restored is W_pre to the last bit.
        return Tailored(torch.where(kept, w_ft + change, w_pre), kept, error, plain_error)


def damp(hessian: Tensor) -> Tensor:
    """H with ``DAMPING * mean(diag H)`` added to its diagonal, so that it can be inverted."""
    diagonal = hessian.diagonal()
    # Inputs that were all zero leave H = 0, and any positive diagonal will do.
    added = DAMPING * diagonal.mean() if diagonal.any() else diagonal.new_ones(())
    return hessian + torch.diag(added.expand(len(hessian)))


def scores(w_pre: Tensor, w_ft: Tensor, damped: Tensor) -> Tensor:
    """Half salience (size of the change), half sensitivity (cost of removal), (p, q)."""
    inverse_diagonal = torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()
    found = torch.empty_like(w_ft)
    for block, pre, ft in zip(*(x.split(BLOCK_ROWS) for x in (found, w_pre, w_ft)), strict=True):
        torch.add(_standard((ft - pre).abs()), _standard((ft / inverse_diagonal).square()), out=block)
    return found.mul_(0.5)


def _standard(x: Tensor) -> Tensor:
    """Standard scores over a block; 0 where all entries are equal."""
    spread = x.std(correction=0)
    return (x - x.mean()) / torch.where(spread > 0, spread, 1)


def _error(change: Tensor, hessian: Tensor) -> float:
    """||change X||_F / sqrt(n): n/2 H is X X^T."""
    square = ((change @ hessian) * change).sum(dtype=torch.float64) / 2
    return math.sqrt(max(float(square), 0.0))


def _compensation(restored: Tensor, kept: Tensor, damped: Tensor) -> Tensor:
    """The move of the kept entries, (p, q), 0 elsewhere.

    Row by row K differs, so each solves a system of its own; rows with about as many kept entries are solved together.
    """
    gradient = restored @ damped
    moves = torch.zeros_like(restored)
    counts = kept.sum(dim=1)
    order = counts.argsort(stable=True)
    start = int((counts == 0).sum())
    widths = counts[order].tolist()
    while start < len(widths):
        end = start + 1
        while end < len(widths) and (end + 1 - start) * widths[end] ** 2 <= _SOLVED_ENTRIES:
            end += 1
        rows = order[start:end]
        # Columns of the kept entries, filled up with others; those get a row of the identity and move by 0.
        columns = kept[rows].byte().sort(dim=1, descending=True, stable=True).indices[:, : widths[end - 1]]
        used = kept[rows].gather(1, columns)
        systems = damped[columns.unsqueeze(2), columns.unsqueeze(1)]
        systems.masked_fill_(~(used.unsqueeze(2) & used.unsqueeze(1)), 0)
        systems.diagonal(dim1=1, dim2=2).masked_fill_(~used, 1)
        right = torch.where(used, gradient[rows].gather(1, columns), 0).unsqueeze(2)
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(systems)).squeeze(2)
        moves[rows] = moves[rows].scatter(1, columns, -solved)
        start = end
    return moves
