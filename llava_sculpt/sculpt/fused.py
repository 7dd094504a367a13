"""CMR's gradients on a GPU, with M, B A and Q never in its memory: one Triton kernel, run twice.

PyTorch's own operations write and read every tile of B A several times; here W is read twice and nothing of its size
is written. Triton comes with PyTorch's CUDA builds on Linux, and wants a C compiler and Python's headers at run time.
TRITON_INTERPRET=1 runs the kernel on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_sculpt.sculpt.retention import Retention

# A program takes _STEPS * _COLUMNS columns of _ROWS rows of W; with all columns there would be too few programs.
_ROWS, _COLUMNS, _STEPS = 64, 32, 16


def probe(device: torch.device, rank: int, norm: str) -> None:
    """Build the kernel as training will use it and compare it with the formula; raises RuntimeError if it is wrong.

    Whatever Triton raises where it cannot build or run the kernel comes through.
    """
    generator = torch.Generator().manual_seed(0)
    # Small integers: their products are exact, so rounding decides no sign.
    A, B = (torch.randint(-2, 3, shape, generator=generator).float().to(device) for shape in ((rank, 64), (64, rank)))
    weight = torch.randn(64, 64, generator=generator).bfloat16().to(device)
    retention = Retention.of(weight)
    M, P = retention.of_block(weight).double(), B.double() @ A.double()
    Q = M.square() * P if norm == "fro" else M * P.sign()
    expected = B.double().T @ Q, Q @ A.double().T
    for found, right in zip(fused_gradients(A, B, weight, retention, norm), expected, strict=True):
        error = float((found - right).norm() / right.norm())
        if not error < 1e-5:
            raise RuntimeError(f"its result is off by {error:.0e}")


def fused_gradients(
    lora_A: Tensor, lora_B: Tensor, weight: Tensor, retention: Retention, norm: str
) -> tuple[Tensor, Tensor]:
    """grad_A (r, q) and grad_B (p, r) of ``conflict_terms``, float32; sums in a fixed order.

    Args:
        lora_A, lora_B: float32, on one GPU. weight: 16-bit, in the dtype of ``retention``.
    """
    retention.check(weight)
    assert retention.table is not None
    bits = weight.detach().view(torch.int16)
    with torch.cuda.device_of(weight):  # Triton launches on the current one
        grad_B = _run(lora_B, lora_A, bits, retention.table, norm)
        # The same problem transposed: B A is to W what A^T B^T is to W^T.
        grad_A = _run(lora_A.T, lora_B.T, bits.T, retention.table, norm).T
    return grad_A, grad_B


def _run(left: Tensor, right: Tensor, bits: Tensor, table: Tensor, norm: str) -> Tensor:
    """Q right^T for the Q of left right: (rows, r)."""
    (rows, rank), columns = left.shape, right.shape[1]
    count = triton.cdiv(columns, _STEPS * _COLUMNS)
    parts = torch.empty(count, rows, rank, dtype=torch.float32, device=left.device)
    strides = (*left.stride(), *right.stride(), *bits.stride())
    padded = max(16, triton.next_power_of_2(rank))
    _kernel[(triton.cdiv(rows, _ROWS), count)](
        left, right, bits, table, parts, rows, columns, rank, *strides,
        L1=norm == "l1", RANK=padded, ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS,
        num_stages=3 if padded <= 64 else 1,  # loads ahead of use take shared memory
    )  # fmt: skip
    return parts.sum(0)


@triton.jit
def _kernel(
    left, right, bits, table, parts, rows, columns, rank,
    left_row, left_rank, right_rank, right_column, bits_row, bits_column,
    L1: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    u = tl.load(
        left + i[:, None] * left_row + k[None, :] * left_rank,
        mask=(i[:, None] < rows) & (k[None, :] < rank),
        other=0.0,
    )
    total = tl.full((ROWS, RANK), 0.0, tl.float32)
    for step in range(STEPS):
        j = (part * STEPS + step) * COLUMNS + tl.arange(0, COLUMNS)
        v = tl.load(
            right + k[:, None] * right_rank + j[None, :] * right_column,
            mask=(k[:, None] < rank) & (j[None, :] < columns),
            other=0.0,
        )
        inside = (i[:, None] < rows) & (j[None, :] < columns)
        pattern = tl.load(bits + i[:, None] * bits_row + j[None, :] * bits_column, mask=inside, other=0)
        m = tl.load(table + (pattern.to(tl.int32) & 0x7FFF))  # without the sign: |W|
        # Outside of W the product is 0, and with it all that follows. Three TF32 products each are float32 to 2e-7,
        # and faster than float32 arithmetic.
        product = tl.dot(u, v, input_precision="tf32x3")
        sign = tl.where(product > 0, 1.0, tl.where(product < 0, -1.0, 0.0 * product))  # of NaN: NaN
        q = sign * m if L1 else product * m * m
        total += tl.dot(q, tl.trans(v), input_precision="tf32x3")
    tl.store(
        parts + (part * rows + i[:, None]) * rank + k[None, :],
        total,
        mask=(i[:, None] < rows) & (k[None, :] < rank),
    )
