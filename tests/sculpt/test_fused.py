"""The GPU kernel of CMR against the plain formula in float64: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor

from llava_sculpt.sculpt import Retention, conflict_penalty, retention_mask
from llava_sculpt.sculpt.cmr import FUSED_MAX_RANK, fused_gradients_on

pytest.importorskip("triton", reason="needs triton (make setup-dev; on Linux)")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
with pytest.MonkeyPatch.context() as patch:  # read when the kernel is declared
    if DEVICE.type == "cpu":
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
    from llava_sculpt.sculpt.fused import fused_gradients

pytestmark = pytest.mark.gpu
NORMS = ["fro", "l1"]


def make(p: int, q: int, r: int, dtype: torch.dtype, norm: str = "fro") -> tuple[Tensor, Tensor, Tensor]:
    """A, B, W. For L1 of small integers: rounding must not decide the sign of an entry of BA that is nearly 0."""
    generator = torch.Generator().manual_seed(p + q + r)
    W = (torch.randn(p, q, generator=generator) * 0.02).to(dtype)
    A, B = torch.randn(r, q, generator=generator), torch.randn(p, r, generator=generator)
    return tuple(x.to(DEVICE) for x in ((A, B, W) if norm == "fro" else (A.round(), B.round(), W)))


def float64_gradients(A: Tensor, B: Tensor, W: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    A, B, M = A.double(), B.double(), retention_mask(W).double()
    Q = M.square() * (B @ A) if norm == "fro" else M * (B @ A).sign()
    return B.T @ Q, Q @ A.T


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-6) -> None:
    for gradient, reference in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32 and gradient.shape == reference.shape
        assert (gradient - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("p", "q", "r"), [(64, 64, 16), (100, 70, 5), (1, 530, 20), (130, 9, 33), (65, 65, FUSED_MAX_RANK)]
)
def test_any_shape(p: int, q: int, r: int, dtype: torch.dtype, norm: str) -> None:
    assert fused_gradients_on(DEVICE, r, norm) is fused_gradients
    A, B, W = make(p, q, r, dtype, norm)
    assert_close(fused_gradients(A, B, W, Retention.of(W), norm), float64_gradients(A, B, W, norm))


def test_blocks_of_larger_matrices() -> None:
    """What ZeRO-3 passes: rows and columns cut out of A, B and W."""
    A, B, W = make(90, 80, 8, torch.bfloat16)
    A, B, block = A[:, 3:70], B[11:60], W[11:60, 3:70]
    M, (A64, B64) = retention_mask(W)[11:60, 3:70].double(), (A.double(), B.double())
    Q = M.square() * (B64 @ A64)
    assert_close(fused_gradients(A, B, block, Retention.of(W), "fro"), (B64.T @ Q, Q @ A64.T))


@pytest.mark.parametrize("norm", NORMS)
def test_a_diverged_adapter_is_not_hidden(norm: str) -> None:
    A, B, W = make(64, 48, 16, torch.bfloat16)
    B[3, 2] = torch.nan
    grad_A, grad_B = fused_gradients(A, B, W, Retention.of(W), norm)
    assert grad_A.isnan().any() and grad_B[3].isnan().all() and not grad_B[4].isnan().any()


def test_retention_of_another_dtype_is_refused() -> None:
    A, B, W = make(64, 48, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"prepared for torch\.bfloat16, weight is torch\.float16"):
        fused_gradients(A, B, W.half(), Retention.of(W), "fro")


def test_where_it_cannot_be_had_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llava_sculpt.sculpt.fused", None)
    with pytest.warns(UserWarning, match="without its fused GPU kernel, and slower: import of"):
        assert fused_gradients_on(torch.device("cuda", 99), 16, "fro") is None


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = sys.modules[fused_gradients.__module__]
    monkeypatch.setattr(fused, "fused_gradients", lambda A, B, *_: (torch.zeros_like(A), torch.zeros_like(B)))
    with pytest.warns(UserWarning, match="its result is off by 1e"):
        assert fused_gradients_on(DEVICE, 17, "fro") is None


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU (make test-gpu)")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("r", [16, 32, 64, FUSED_MAX_RANK, FUSED_MAX_RANK + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_penalty_on_a_gpu(dtype: torch.dtype, r: int, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole matrices, fused or not, with TF32 asked for elsewhere; the same bits again."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32", raising=False)
    A, B, W = make(1408, 1024, r, dtype, norm)
    values = []
    for _ in range(2):
        leaves = [factor.clone().requires_grad_() for factor in (A, B)]
        value = conflict_penalty(*leaves, W, norm=norm)
        values.append((value.detach(), *torch.autograd.grad(value, leaves)))
    assert all(torch.equal(first, again) for first, again in zip(*values, strict=True))
    weighted = retention_mask(W).double() * (B.double() @ A.double())
    expected = weighted.norm() if norm == "fro" else weighted.abs().sum()
    assert float((values[0][0] - expected).abs()) <= 1e-6 * float(expected)
    slope = 1 / expected if norm == "fro" else 1.0
    assert_close(values[0][1:], tuple(slope * gradient for gradient in float64_gradients(A, B, W, norm)))
