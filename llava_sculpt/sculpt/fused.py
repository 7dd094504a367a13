"""CMR of many matrices of one shape on a GPU, in four launches, with M, B A and Q never in its memory.

PyTorch's own operations write and read every tile of B A several times, and a step over 96 matrices is then some
thousand launches. Here one kernel finds the largest entries of every A and B, one walks W and yields both gradients as
partial sums, one adds those of B up (with the float64 value), one writes the gradients. W is read once and nothing of
its size is written; sums are added in a fixed order and without atomics, so that the same input gives the same bits.

Products are of bf16 parts with float32 sums: a float32 number is the sum of three (24 bits), a bf16 factor is one, and
of the nine products of parts those below 2^-24 are left out. So B A costs one product for bf16 factors and six for
others, and Q with a factor three or six.

Triton comes with PyTorch's CUDA builds on Linux, and wants a C compiler and Python's headers at run time. On a CPU the
kernels run in its interpreter (TRITON_INTERPRET=1), which multiplies no bf16: there the parts are float32 numbers.

Checked in the interpreter: values and gradients to 1e-6 against float64, ragged shapes, several tiles, zeros, NaN. By
compiling for sm_80, sm_89 and sm_90 at ranks 16 to 128: machine code on tensor cores, registers, shared memory. Not yet
run on a GPU: there the check before the first use decides (`probe`), and `benchmarks/cmr.py` measures.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_sculpt.sculpt.cmr import TILE, TILE_ALONE
from llava_sculpt.sculpt.retention import Retention

_UNITS = 16  # programs that share a factor in the search for its largest entry
_BLOCK = 1024  # entries of a gradient that one program adds up
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_OPERAND = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16


def _tile(rank: int) -> dict[str, int]:
    """What of W a program has on the chip at a time, and by how many warps.

    Compiled for sm_89 none of these spills a register, and the largest (rank 128, float32) takes 98 KB of shared
    memory, of the 99 that a 24 GB card has. With few rows, and no rank below 32, Triton places the warps side by side;
    in other shapes it lets them do the same work up to four times.
    """
    padded = max(32, triton.next_power_of_2(rank))
    return {"RANK": padded, "ROWS": 16, "COLUMNS": 64, "num_warps": 4 if padded == 32 else 8}


def probe(device: torch.device, rank: int, dtype: torch.dtype, norm: str) -> None:
    """Build the kernels as training will use them and compare with the formula; raises RuntimeError if they are wrong.

    Whatever Triton raises where it cannot build or run them comes through.
    """
    generator = torch.Generator().manual_seed(0)
    # Small integers: their products are exact, so rounding decides no sign.
    A, B = (
        torch.randint(-2, 3, shape, generator=generator).to(device, dtype) for shape in ((2, rank, 80), (2, 80, rank))
    )
    weights = torch.randn(2, 80, 80, generator=generator).bfloat16().to(device)
    retentions = [Retention.of(weight) for weight in weights]
    found = group_gradients([*A], [*B], [*weights], retentions, norm)
    for index, (weight, retention) in enumerate(zip(weights, retentions, strict=True)):
        M, P = retention.of_block(weight).double(), B[index].double() @ A[index].double()
        Q = M.square() * P if norm == "fro" else M * P.sign()
        value = (Q * P).sum().sqrt() if norm == "fro" else (Q * P).sum()
        slope = 1 / value if norm == "fro" else 1
        expected = value, slope * B[index].double().T @ Q, slope * Q @ A[index].double().T
        for mine, right in zip((part[index] for part in found), expected, strict=True):
            error = float((mine - right).norm() / right.norm())
            if not error < 1e-5:
                raise RuntimeError(f"its result is off by {error:.0e}")


def group_gradients(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weights: Sequence[Tensor],
    retentions: Sequence[Retention],
    norm: str,
    scale: Tensor | None = None,
    of_terms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (n,) and gradients (n, r, q), (n, p, r) of n matrices of one shape: `penalties_and_gradients`.

    Args:
        lora_A, lora_B: of one dtype, on one GPU. weights: 16-bit, in the dtype of their retention.
        scale: float32 scalar, on the GPU. With it the gradients are multiplied and have the dtype of the factors.
        of_terms: what `conflict_terms` has in place of the norm and its gradients; values in float64.
    """
    for weight, retention in zip(weights, retentions, strict=True):
        retention.check(weight)
    n, (rank, q), p = len(weights), lora_A[0].shape, len(lora_B[0])
    device, dtype = weights[0].device, lora_A[0].dtype
    tables: list[Any] = [retention.table for retention in retentions]
    tensors = [x.detach().contiguous() for matrix in zip(lora_A, lora_B, weights, tables, strict=True) for x in matrix]
    if any(x.device != device for x in tensors):  # a kernel would follow the address
        raise ValueError(f"A, B, W and retention must be on one device, {device}")
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    pointers = _pointer_table(addresses, device)
    units = torch.empty(n, 2, _UNITS, dtype=torch.int32, device=device)
    rows, columns = TILE if n > 1 else TILE_ALONE
    parts_A = torch.empty(n, triton.cdiv(p, rows), rank, q, device=device)
    parts_B = torch.empty(n, triton.cdiv(q, columns), p, rank, device=device)
    blocks_A, blocks_B = triton.cdiv(rank * q, _BLOCK), triton.cdiv(p * rank, _BLOCK)
    dots = torch.empty(n, blocks_B, dtype=torch.float64, device=device)
    values = torch.empty(n, dtype=torch.float64 if of_terms else torch.float32, device=device)
    written = torch.float32 if scale is None else dtype
    grad_A = torch.empty(n, rank, q, dtype=written, device=device)
    grad_B = torch.empty(n, p, rank, dtype=written, device=device)

    sizes = pointers, units, p, q, rank
    factor = {"FACTOR": _DTYPES[dtype], "ALIGNED": all(address % 16 == 0 for address in addresses), "UNITS": _UNITS}
    with torch.cuda.device_of(weights[0]):  # Triton launches on the current one
        if of_terms:
            units.fill_(0x3F800000)  # 1.0
        else:
            _largest[(n, 2, _UNITS)](*sizes, **factor, BLOCK=_BLOCK)
        _walk[(parts_B.shape[1], parts_A.shape[1], n)](
            *sizes, parts_A, parts_B, **factor,
            OPERAND=_OPERAND, SPLIT=dtype != torch.bfloat16, L1=norm == "l1",
            TILE_ROWS=rows, TILE_COLUMNS=columns, **_tile(rank), num_stages=1,
        )  # fmt: skip
        _add_up[(blocks_B, n)](*sizes, parts_B, dots, **factor, COUNT=parts_B.shape[1], BLOCK=_BLOCK)
        _finish[(blocks_A + blocks_B, n)](
            *sizes[1:], parts_A, parts_B, dots, values, grad_A, grad_B, units if scale is None else scale,
            COUNT_A=parts_A.shape[1], COUNT_B=parts_B.shape[1], BLOCKS_B=blocks_B,
            DOTS=triton.next_power_of_2(blocks_B), SCALED=scale is not None,
            NORM="terms" if of_terms else norm, UNITS=_UNITS, BLOCK=_BLOCK,
        )  # fmt: skip
    return values, grad_A, grad_B


@functools.lru_cache(maxsize=1024)
def _pointer_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the GPU: copied there once, and again when one has changed."""
    return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)


@triton.jit
def _factor(pointers, index, FACTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to A (index 0), B (1) or W (2, as 16-bit patterns) of this program's matrix."""
    pointer = tl.load(pointers + index).to(tl.pointer_type(FACTOR))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _exponent(units, UNITS: tl.constexpr):
    """The biased exponent of a factor's unit, the power of two below its largest entry. Kept where 1 / unit is one."""
    return tl.minimum(tl.maximum(tl.max(tl.load(units + tl.arange(0, UNITS)), 0) >> 23, 1), 253)


@triton.jit
def _power_of_two(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(
    pointers, units, p, q, rank,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bits of the largest magnitude in one of UNITS parts of A or B; as integers NaN is above all."""
    matrix, which, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x = _factor(pointers, 4 * matrix + which, FACTOR, ALIGNED)
    count = tl.where(which == 0, rank * q, p * rank)
    largest = tl.full((BLOCK,), 0, tl.int32)
    for start in range(part * BLOCK, count, UNITS * BLOCK):
        i = start + tl.arange(0, BLOCK)
        entry = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, entry.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(units + (matrix * 2 + which) * UNITS + part, tl.max(largest, 0))


@triton.jit
def _split(x, OPERAND: tl.constexpr):
    """Three bf16 numbers whose sum is the float32 x."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    low = (x - middle.to(tl.float32)).to(tl.bfloat16)
    return high.to(OPERAND), middle.to(OPERAND), low.to(OPERAND)


@triton.jit
def _dot(x0, x1, x2, y0, y1, y2, SPLIT_X: tl.constexpr, SPLIT_Y: tl.constexpr):
    """x y from their parts, small products first; without a split x is x0, and y is y0."""
    total = tl.full((x0.shape[0], y0.shape[1]), 0.0, tl.float32)
    if SPLIT_X and SPLIT_Y:
        total = tl.dot(x1, y1, total)
    if SPLIT_X:
        total = tl.dot(x2, y0, total)
    if SPLIT_Y:
        total = tl.dot(x0, y2, total)
    if SPLIT_X:
        total = tl.dot(x1, y0, total)
    if SPLIT_Y:
        total = tl.dot(x0, y1, total)
    return tl.dot(x0, y0, total)


@triton.jit
def _walk(
    pointers, units, p, q, rank, parts_A, parts_B,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, UNITS: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, L1: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Both gradients of one tile of W: grad_A's part is summed in registers down the rows of some columns, grad_B's in
    memory (this program's own, in the cache) from one set of columns to the next."""
    part_B, part_A, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    A = _factor(pointers, 4 * matrix, FACTOR, ALIGNED)
    B = _factor(pointers, 4 * matrix + 1, FACTOR, ALIGNED)
    W = _factor(pointers, 4 * matrix + 2, tl.int16, ALIGNED)
    table = tl.load(pointers + 4 * matrix + 3).to(tl.pointer_type(tl.float32))
    inverse_A = _power_of_two(254 - _exponent(units + 2 * matrix * UNITS, UNITS))
    inverse_B = _power_of_two(254 - _exponent(units + (2 * matrix + 1) * UNITS, UNITS))
    parts_A += (matrix.to(tl.int64) * tl.num_programs(1) + part_A) * rank * q
    parts_B += (matrix.to(tl.int64) * tl.num_programs(0) + part_B) * p * rank
    first_row, first_column = part_A * TILE_ROWS, part_B * TILE_COLUMNS
    last_row, last_column = tl.minimum(first_row + TILE_ROWS, p), tl.minimum(first_column + TILE_COLUMNS, q)
    k = tl.arange(0, RANK)
    for column in range(first_column, last_column, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        of_A = (k[:, None] < rank) & (j[None, :] < q)
        a = tl.load(A + k[:, None] * q + j[None, :], mask=of_A, other=0.0).to(tl.float32) * inverse_A
        a0, a1, a2 = _split(a, OPERAND)
        grad_A = tl.full((RANK, COLUMNS), 0.0, tl.float32)
        i = first_row + tl.arange(0, ROWS)
        bits = tl.load(W + i[:, None] * q + j[None, :], mask=(i[:, None] < p) & (j[None, :] < q), other=0)
        of_B, place = (i[:, None] < p) & (k[None, :] < rank), i[:, None] * rank + k[None, :]
        b = tl.load(B + place, mask=of_B, other=0.0)
        for row in range(first_row, last_row, ROWS):
            earlier = of_B & (k[None, :] < rank * (column - first_column))  # none for the first columns
            grad_B = tl.load(parts_B + place, mask=earlier, other=0.0)
            m = tl.load(table + (bits.to(tl.int32) & 0x7FFF))  # without the sign: |W|
            b0, b1, b2 = _split(b.to(tl.float32) * inverse_B, OPERAND)
            of_these, these = of_B, place
            # The next rows of W and B are on their way while these are worked on.
            i = row + ROWS + tl.arange(0, ROWS)
            bits = tl.load(W + i[:, None] * q + j[None, :], mask=(i[:, None] < p) & (j[None, :] < q), other=0)
            of_B, place = (i[:, None] < p) & (k[None, :] < rank), i[:, None] * rank + k[None, :]
            b = tl.load(B + place, mask=of_B, other=0.0)
            # Outside of W the product is 0, and with it all that follows.
            product = _dot(b0, b1, b2, a0, a1, a2, SPLIT, SPLIT)
            if L1:
                sign = tl.where(product > 0, 1.0, tl.where(product < 0, -1.0, 0.0 * product))  # of NaN: NaN
                weighted = sign * m
            else:
                weighted = product * m * m
            q0, q1, q2 = _split(weighted, OPERAND)
            grad_A += _dot(tl.trans(b0), tl.trans(b1), tl.trans(b2), q0, q1, q2, SPLIT, True)
            grad_B += _dot(q0, q1, q2, tl.trans(a0), tl.trans(a1), tl.trans(a2), True, SPLIT)
            tl.store(parts_B + these, grad_B, mask=of_these)
        tl.store(parts_A + k[:, None] * q + j[None, :], grad_A, mask=of_A)
        tl.debug_barrier()  # grad_B's parts are read again


@triton.jit
def _add_up(
    pointers, units, p, q, rank, parts_B, dots,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, UNITS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first of COUNT parts of grad_B becomes their sum; its float64 product with B is a part of the value."""
    block, matrix = tl.program_id(0), tl.program_id(1)
    B = _factor(pointers, 4 * matrix + 1, FACTOR, ALIGNED)
    inverse_B = _power_of_two(254 - _exponent(units + (2 * matrix + 1) * UNITS, UNITS))
    parts_B += matrix.to(tl.int64) * COUNT * p * rank
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < p * rank
    total = tl.load(parts_B + i, mask=inside, other=0.0)
    for part in range(1, COUNT):
        total += tl.load(parts_B + part * p * rank + i, mask=inside, other=0.0)
    tl.store(parts_B + i, total, mask=inside)
    b = tl.load(B + i, mask=inside, other=0.0).to(tl.float32) * inverse_B
    tl.store(dots + matrix * tl.num_programs(0) + block, tl.sum(total.to(tl.float64) * b.to(tl.float64), 0))


@triton.jit
def _finish(
    units, p, q, rank, parts_A, parts_B, dots, values, grads_A, grads_B, scale,
    COUNT_A: tl.constexpr, COUNT_B: tl.constexpr, BLOCKS_B: tl.constexpr, DOTS: tl.constexpr,
    SCALED: tl.constexpr, NORM: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The value, and one block of a gradient from the sum of its parts."""
    block, matrix = tl.program_id(0), tl.program_id(1)
    unit_A = _power_of_two(_exponent(units + 2 * matrix * UNITS, UNITS))
    unit_B = _power_of_two(_exponent(units + (2 * matrix + 1) * UNITS, UNITS))
    d = tl.arange(0, DOTS)
    value = tl.sum(tl.load(dots + matrix * BLOCKS_B + d, mask=d < BLOCKS_B, other=0.0), 0)
    slope = 1.0
    if NORM != "terms":
        value = tl.where(value < 0, 0.0, value)  # rounding may leave -1e-17 when all of B A cancels
    if NORM == "fro":
        value = tl.sqrt(value)
        slope = tl.where(value == 0, 0.0, 1.0 / value).to(tl.float32)  # the subgradient 0 at L = 0; of NaN: NaN
    if block == 0:
        tl.store(values + matrix, value * unit_A.to(tl.float64) * unit_B.to(tl.float64))
    i = block * BLOCK + tl.arange(0, BLOCK)
    if block < tl.num_programs(0) - BLOCKS_B:
        parts, gradients = parts_A + matrix.to(tl.int64) * COUNT_A * rank * q, grads_A + matrix.to(tl.int64) * rank * q
        inside, other_unit = i < rank * q, unit_B
        total = tl.load(parts + i, mask=inside, other=0.0)
        for part in range(1, COUNT_A):
            total += tl.load(parts + part * rank * q + i, mask=inside, other=0.0)
    else:
        i -= (tl.num_programs(0) - BLOCKS_B) * BLOCK
        parts, gradients = parts_B + matrix.to(tl.int64) * COUNT_B * p * rank, grads_B + matrix.to(tl.int64) * p * rank
        inside, other_unit = i < p * rank, unit_A
        total = tl.load(parts + i, mask=inside, other=0.0)
    total = total * slope * other_unit
    if SCALED:
        total *= tl.load(scale)
    tl.store(gradients + i, total, mask=inside)
