"""The conflict-mitigation regularizer, CMR (Eq. 8 and 10), at the price of three thin matrix products.

    L = || M * (B A) ||    * is elementwise; Frobenius norm for the LLM (Eq. 8), L1 for the connector (Eq. 10)

Neither M nor B A is ever held as a whole. The rows of W are walked in tiles; each tile forms its part of
P = B A, weights it by M, and contributes to both gradients at once:

    Frobenius:  Q = M^2 * P         value = sum(Q * P) = L^2     gradients: those of L, times L
    L1:         Q = M * sign(P)     value = sum(Q * P) = L       gradients: those of L
    both:       grad_B = Q A^T      grad_A = B^T Q               value = <grad_B, B>, so it costs nothing

The LoRA scale ``lora_alpha / r`` is not part of B A here, as in the paper and in the authors' release.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from llava_sculpt.sculpt.retention import Retention

Norm = Literal["fro", "l1"]
# Above it, a program's part of the fused kernels no longer fits the shared memory of a 24 GB card (99 KB).
FUSED_MAX_RANK = 128
# Rows and columns of W that a program of the fused kernels takes, to leave one part of each gradient: the larger, the
# fewer parts; a matrix alone needs smaller ones to be enough programs for a GPU.
TILE, TILE_ALONE = (512, 1024), (128, 512)
GROUP_BYTES = 160 * 2**20  # that a group of matrices may take for these parts, and for its gradients


def conflict_terms(
    lora_A: Tensor,
    lora_B: Tensor,
    weight: Tensor,
    retention: Retention,
    norm: Norm = "fro",
    tile_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of CMR on a block of the matrix, before the square root of the Frobenius norm.

    The results of disjoint blocks add up: for a block of rows and columns of W pass those rows of B and those
    columns of A; ``retention`` is that of the whole matrix. Nothing here is differentiable.

    Args:
        lora_A: (r, q). lora_B: (p, r). weight: (p, q), the block of W in the dtype of ``retention``.
        tile_rows: rows per tile. By default 16-bit weights on a CUDA GPU go through fused kernels
            (``fused.py``); else 128 on CPU (the tile stays in cache) and 1024 elsewhere.

    Returns:
        (value, grad_A, grad_B): float64 scalar, float32 (r, q), float32 (p, r). "l1": value and gradients
        of ``sum |M * BA|``. "fro": value is ``sum (M * BA)^2`` and the gradients are half of its gradients;
        divide them by the root of the (summed) value to get those of the norm.

    Raises:
        ValueError: shapes, devices or norm that do not fit.
    """
    _check(lora_A, lora_B, weight, norm)
    A, B = lora_A.detach().float(), lora_B.detach().float()
    fused = _fused([A], [B], [weight], norm) if tile_rows is None else None
    if fused is not None:
        value, grad_A, grad_B = fused([A], [B], [weight], [retention], norm, of_terms=True)
        return value[0], grad_A[0], grad_B[0]
    tile_rows = tile_rows or (128 if weight.device.type == "cpu" else 1024)
    with torch.no_grad(), full_float32(weight.device.type):
        value = torch.zeros((), dtype=torch.float64, device=weight.device)
        grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
        for rows_B, rows_grad_B, rows_W in zip(
            B.split(tile_rows), grad_B.split(tile_rows), weight.split(tile_rows), strict=True
        ):
            M = retention.of_block(rows_W)
            Q = rows_B @ A
            if norm == "fro":
                Q.mul_(M).mul_(M)
            else:
                Q.sign_().mul_(M)
            torch.mm(Q, A.T, out=rows_grad_B)
            grad_A.addmm_(rows_B.T, Q)
            value += torch.dot(rows_grad_B.double().flatten(), rows_B.double().flatten())
            del M, Q  # before the next tile's are allocated
    return value, grad_A, grad_B


def penalties_and_gradients(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weights: Sequence[Tensor],
    retentions: Sequence[Retention],
    norm: Norm = "fro",
    scale: Tensor | None = None,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """``prepared_penalty`` of n matrices and its gradients. Not differentiable.

    On a CUDA GPU matrices of one shape, rank and dtype with 16-bit W go through four launches together; then the
    gradients and partial sums of all n live at once (``matrices_at_once``). Else one matrix follows the other.

    Args:
        lora_A: n times (r, q). lora_B: n times (p, r). weights: n times (p, q). retentions: theirs.
        scale: float32 scalar, what the gradients are multiplied with before they are cast to their factors' dtypes;
            without it they are those of the penalties, in float32.

    Returns:
        (values, gradients in A, gradients in B): float32 (n,), n times (r, q), n times (p, r).

    Raises:
        ValueError: shapes, devices or norm that do not fit.
    """
    for matrix in zip(lora_A, lora_B, weights, strict=True):
        _check(*matrix, norm)
    fused = _fused(lora_A, lora_B, weights, norm)
    if fused is not None:
        together = fused(lora_A, lora_B, weights, retentions, norm, scale)
        return together[0], together[1].unbind(), together[2].unbind()
    values, grads_A, grads_B = [], [], []
    for A, B, weight, retention in zip(lora_A, lora_B, weights, retentions, strict=True):
        value, grad_A, grad_B = _one_matrix(A, B, weight, retention, norm)
        values.append(value)
        grads_A.append(grad_A if scale is None else grad_A.mul_(scale).to(A.dtype))
        grads_B.append(grad_B if scale is None else grad_B.mul_(scale).to(B.dtype))
    return torch.stack(values), grads_A, grads_B


def penalty_and_gradients(
    lora_A: Tensor, lora_B: Tensor, weight: Tensor, retention: Retention, norm: Norm = "fro"
) -> tuple[Tensor, Tensor, Tensor]:
    """``prepared_penalty`` and its gradients in A and B: float32 scalar, (r, q), (p, r). Not differentiable."""
    value, grad_A, grad_B = penalties_and_gradients([lora_A], [lora_B], [weight], [retention], norm)
    return value[0], grad_A[0], grad_B[0]


def runs_in_groups(weight: Tensor) -> bool:
    """Whether matrices like this W are better given to ``penalties_and_gradients`` together."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def matrices_at_once(p: int, q: int, rank: int, factor_bytes: int) -> int:
    """How many W (p, q) one call of ``penalties_and_gradients`` may take on a GPU.

    Args:
        factor_bytes: of one entry of A or B.
    """
    return max(1, GROUP_BYTES // (group_bytes(p, q, rank, factor_bytes, 2) // 2))


def group_bytes(p: int, q: int, rank: int, factor_bytes: int, count: int) -> int:
    """What ``count`` of them take: partial sums of both gradients in float32, and the gradients."""
    rows, columns = TILE if count > 1 else TILE_ALONE
    parts = 4 * (-(-p // rows) * q + -(-q // columns) * p)
    return count * rank * (parts + factor_bytes * (p + q))


def _one_matrix(
    lora_A: Tensor, lora_B: Tensor, weight: Tensor, retention: Retention, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    # L is homogeneous in A and in B. With each measured in units of its largest entry (a power of two, so
    # this is exact) no product leaves float32's range, however small the adapter still is.
    unit_A, unit_B = power_of_two_below(lora_A), power_of_two_below(lora_B)
    with torch.no_grad():
        value, grad_A, grad_B = conflict_terms(
            lora_A.float() / unit_A, lora_B.float() / unit_B, weight, retention, norm
        )
        value.clamp_(min=0)  # rounding may leave -1e-17 when all of B A cancels
        if norm == "fro":
            value.sqrt_()
            slope = torch.where(value > 0, value.reciprocal(), 0).float()  # the subgradient 0 at L = 0
            grad_A.mul_(slope)
            grad_B.mul_(slope)
        return (value * unit_A * unit_B).float(), grad_A.mul_(unit_B), grad_B.mul_(unit_A)


def _fused(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], weights: Sequence[Tensor], norm: Norm
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """``group_gradients`` where it can take these matrices."""
    if not all(runs_in_groups(weight) and 0 < weight.numel() < 2**31 for weight in weights):
        return None
    alike = {(a.shape, b.shape, a.dtype, b.dtype, w.device) for a, b, w in zip(lora_A, lora_B, weights, strict=True)}
    (rank, _), _, dtype, dtype_B, device = next(iter(alike))
    if len(alike) > 1 or dtype != dtype_B or dtype == torch.float64 or rank > FUSED_MAX_RANK:
        return None
    return fused_gradients_on(device, rank, dtype, norm)


@functools.cache
def fused_gradients_on(
    device: torch.device, rank: int, dtype: torch.dtype, norm: Norm
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """``group_gradients`` if it can be built for factors of ``dtype`` and is right on this device; else None, with a
    warning that says why."""
    try:
        from llava_sculpt.sculpt.fused import group_gradients, probe

        probe(device, rank, dtype, norm)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, compiler or headers, an old GPU: each raises something of its own
        warnings.warn(f"CMR runs without its fused GPU kernels, and slower: {error}", stacklevel=2)
        return None
    return group_gradients


class _ConflictPenalty(torch.autograd.Function):
    """L with its gradients computed in the forward pass: r (p + q) float32 numbers are all that is kept."""

    @staticmethod
    def forward(ctx: Any, lora_A: Tensor, lora_B: Tensor, weight: Tensor, retention: Retention, norm: Norm) -> Tensor:
        value, *gradients = penalty_and_gradients(lora_A, lora_B, weight, retention, norm)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients below would pass for constants in silence
            raise RuntimeError("CMR can be differentiated only once: call backward without create_graph=True")
        grad_A, grad_B = ctx.saved_tensors
        dtype_A, dtype_B = ctx.dtypes
        return (grad_output * grad_A).to(dtype_A), (grad_output * grad_B).to(dtype_B), None, None, None


def prepared_penalty(
    lora_A: Tensor, lora_B: Tensor, weight: Tensor, retention: Retention, norm: Norm = "fro"
) -> Tensor:
    """``conflict_penalty`` with the constants of W prepared once, by ``Retention.of(weight, omega)``."""
    _check(lora_A, lora_B, weight, norm)
    return _ConflictPenalty.apply(lora_A, lora_B, weight, retention, norm)


def conflict_penalty(lora_A: Tensor, lora_B: Tensor, weight: Tensor, omega: float = 1.0, norm: Norm = "fro") -> Tensor:
    """One layer's term of CMR: ``|| M * (B A) ||`` with M of ``weight`` (Eq. 8: "fro", Eq. 10: "l1").

    Args:
        lora_A: (r, q), any float dtype. lora_B: (p, r), likewise. Differentiable in both, once.
        weight: (p, q), frozen, any float dtype; no gradient flows to it.
        omega: steepness of M (Eq. 7), positive.
        norm: "fro" for the LLM, "l1" for the connector.

    Returns:
        float32 scalar. All arithmetic is float32 or wider whatever the inputs' dtypes, also under autocast
        and with TF32 enabled. The gradients have the dtypes of ``lora_A`` and ``lora_B``; both are exactly 0
        when B = 0 (the start of training) or A = 0.

    Raises:
        ValueError: shapes, devices or norm that do not fit; omega not positive; W empty or with inf or NaN.
        RuntimeError: in a backward pass with create_graph=True; second derivatives are not defined.
    """
    _check(lora_A, lora_B, weight, norm)
    return prepared_penalty(lora_A, lora_B, weight, Retention.of(weight, omega), norm)


def power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two not above the largest magnitude of ``x``, at least the smallest normal float32."""
    largest = x.detach().float().abs().amax()
    exponent_bits = largest.view(torch.int32).bitwise_and_(0x7F800000)
    return exponent_bits.view(torch.float32).clamp_(min=torch.finfo(torch.float32).tiny)


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """No autocast, and no TF32 or bf16 inside float32 matrix products: either costs three digits."""
    cuda: Any = torch.backends.cuda.matmul
    if hasattr(cuda, "fp32_precision"):
        mkldnn: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        switches: list[tuple[Any, str, Any]] = [(b, "fp32_precision", "ieee") for b in (cuda, mkldnn)]
    else:  # torch before 2.9
        switches = [(cuda, "allow_tf32", False)]
    before = [getattr(backend, name) for backend, name, _ in switches]
    for backend, name, exact in switches:
        setattr(backend, name, exact)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for (backend, name, _), value in zip(switches, before, strict=True):
            setattr(backend, name, value)


def _check(lora_A: Tensor, lora_B: Tensor, weight: Tensor, norm: str) -> None:
    if norm not in ("fro", "l1"):
        raise ValueError(f'norm must be "fro" or "l1", got {norm!r}')
    shapes = f"A {tuple(lora_A.shape)}, B {tuple(lora_B.shape)}, W {tuple(weight.shape)}"
    if not lora_A.ndim == lora_B.ndim == weight.ndim == 2:
        raise ValueError(f"A, B and W must be matrices: {shapes}")
    if lora_B.shape[1] != lora_A.shape[0] or weight.shape != (lora_B.shape[0], lora_A.shape[1]):
        raise ValueError(f"expected A (r, q), B (p, r), W (p, q): {shapes}")
    if not lora_A.device == lora_B.device == weight.device:
        devices = f"A {lora_A.device}, B {lora_B.device}, W {weight.device}"
        raise ValueError(f"A, B and W must be on one device: {devices}")
