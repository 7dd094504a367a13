"""The retention mask M (Eq. 6-7): how much each frozen weight counts as pretrained knowledge, in [0, 1].

An entry of M depends on that entry of W and on the norm of W. A 16-bit weight has only 32,768 magnitudes, so
for bf16 and fp16 M is a lookup table of 128 KB per matrix, indexed by the bits of |W|. For wider weights it
is computed entry by entry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-15  # of Eq. 6, as in the authors' release
_CHUNK = 1 << 18  # entries converted to float64 at a time


def frobenius_norm(weight: Tensor) -> float:
    """``||W||`` of Eq. 6: the Frobenius norm, accumulated in float64 in chunks. Any shape, any float dtype.

    The norms of a matrix's shards combine to that of the matrix by ``math.hypot``; an empty shard has norm 0.
    Raises ValueError when ``weight`` holds inf or NaN.
    """
    if weight.numel() == 0:
        return 0.0
    # Squares of 32-bit numbers neither overflow nor vanish in float64; those of float64 numbers may.
    peak = float(weight.abs().max()) if weight.dtype == torch.float64 else 1.0
    squares = torch.zeros((), dtype=torch.float64, device=weight.device)
    rows = weight.detach() if weight.ndim else weight.detach().view(1)
    for chunk in rows.split(max(1, _CHUNK * len(rows) // rows.numel())):
        chunk = chunk.double().flatten()
        if peak not in (0.0, 1.0):
            chunk = chunk / peak
        squares += torch.dot(chunk, chunk)
    norm = peak * math.sqrt(float(squares))
    if not math.isfinite(norm):
        raise ValueError("the weight holds inf or NaN, or its norm is beyond float64")
    return norm


class Retention:
    """What of M outlives a step, for one frozen matrix: its norm, omega and, for 16-bit weights, the table.

    Make it once per matrix with ``Retention.of(weight)``. It keeps no reference to the weight: what it is
    asked about later may be a slice, a shard or a freshly dequantised copy, in the dtype given here.
    """

    def __init__(self, norm: float, dtype: torch.dtype, device: torch.device | str, omega: float = 1.0) -> None:
        """``norm``: ||W||_F of the whole matrix; ``dtype``, ``device``: of the blocks to come.

        Raises ValueError unless omega is positive and finite (at 0, M is undefined where S is infinite).
        """
        if not 0 < omega < math.inf:
            raise ValueError(f"omega must be positive and finite, got {omega}")
        self.norm, self.omega, self.dtype = norm, omega, dtype
        # W / norm is taken in float64 for float64 weights, and where the norm itself leaves float32's range.
        narrow = dtype == torch.float32 and 1e-30 < norm < 1e30
        self._compute_dtype = torch.float32 if narrow else torch.float64
        self.table: Tensor | None = None
        if dtype in (torch.bfloat16, torch.float16):
            every_magnitude = torch.arange(32768, dtype=torch.int16, device=device).view(dtype)
            self.table = self._compute(every_magnitude)

    @classmethod
    def of(cls, weight: Tensor, omega: float = 1.0) -> Retention:
        """Prepare M of ``weight`` (any shape, any float dtype).

        Raises ValueError when ``weight`` is empty (a ZeRO-3 parameter not gathered), or holds inf or NaN.
        """
        if weight.numel() == 0:
            raise ValueError("the weight is empty (a ZeRO-3 parameter must be gathered first)")
        return cls(frobenius_norm(weight), weight.dtype, weight.device, omega)

    def _compute(self, block: Tensor) -> Tensor:
        """Eq. 6-7 on a block of W, as float32."""
        x = block.to(self._compute_dtype).abs()
        if self.norm > 0:  # an all-zero matrix: |W| / ||W|| is taken as 0
            x.div_(self.norm)
        log = x.add_(EPS).log_()
        # Where |W| = ||W|| the logarithm is 0, S is infinite and M is 1. tanh is odd, so |.| may come last.
        return log.reciprocal_().mul_(self.omega).tanh_().abs_().float()

    def check(self, weight: Tensor) -> None:
        """Raises ValueError unless ``weight`` has the dtype this was prepared for."""
        if weight.dtype != self.dtype:
            raise ValueError(f"retention prepared for {self.dtype}, weight is {weight.dtype}")

    def of_block(self, weight: Tensor) -> Tensor:
        """M of ``weight``, any block of the matrix, in the prepared dtype: float32, of the same shape."""
        self.check(weight)
        if self.table is None:
            return self._compute(weight.detach())
        # |W| as a table index: its bits without the sign. int32 indices make the fastest lookup by far.
        codes = weight.detach().view(torch.int16).to(torch.int32).bitwise_and_(0x7FFF)
        return self.table.index_select(0, codes.flatten()).view(weight.shape)


def retention_mask(weight: Tensor, omega: float = 1.0) -> Tensor:
    """``M = tanh(omega * |1 / log(|W| / ||W||_F + 1e-15)|)`` (Eq. 6-7).

    Args:
        weight: frozen weight W, any shape, any float dtype, free of inf and NaN.
        omega: steepness, positive.

    Returns:
        float32 tensor of the shape of ``weight``, entries finite and in [0, 1] for every such input: 0 maps
        to tanh(omega / 34.5), an entry that is all of its matrix's norm maps to 1.

    Raises:
        ValueError: omega not positive and finite; weight empty or with inf or NaN.
    """
    return Retention.of(weight, omega).of_block(weight)
