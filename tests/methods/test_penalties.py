"""L2-Reg and Orth-Reg on one layer, against float64 formulas written out in full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_sculpt.methods.l2 import l2_penalty
from llava_sculpt.methods.orth import orth_penalty

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def make(p: int, q: int, r: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(r, q, generator=generator).requires_grad_()
    lora_B = (torch.randn(p, r, generator=generator) * 0.01).requires_grad_()
    return lora_A, lora_B, (torch.randn(p, q, generator=generator) * 0.02).to(dtype)


def slow(lora_A: Tensor, lora_B: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients by autograd in float64, the q x q product made as written."""
    A = lora_A.detach().double().requires_grad_()
    B = lora_B.detach().double().requires_grad_()
    value = A.square().sum() + B.square().sum() if weight is None else (weight.double().T @ B @ A).norm()
    return (value.detach(), *torch.autograd.grad(value, (A, B)))


def fast(lora_A: Tensor, lora_B: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    value = l2_penalty(lora_A, lora_B) if weight is None else orth_penalty(lora_A, lora_B, weight)
    return (value.detach(), *torch.autograd.grad(value, (lora_A, lora_B)))


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-6) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@DTYPES
@pytest.mark.parametrize("shape", [(300, 70, 4), (40, 200, 16), (1, 1, 1), (129, 5, 8)])
def test_orth_agrees_with_the_product_written_out(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    layer = make(*shape, dtype)
    assert_close(fast(*layer), slow(*layer))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.integers(1, 40), st.integers(1, 6), st.integers(0, 999), st.floats(1e-6, 1e3))
def test_orth_for_any_shape_and_scale(p: int, q: int, r: int, seed: int, scale: float) -> None:
    lora_A, lora_B, weight = make(p, q, r, seed=seed)
    layer = lora_A, (lora_B * scale).detach().requires_grad_(), weight
    # W^T B may cancel down to float32's rounding: relative to the size of what was added up.
    size = weight.norm() * layer[1].norm() * lora_A.norm()
    value, expected = orth_penalty(*layer).detach(), slow(*layer)[0]
    assert abs(value - expected) <= 2e-6 * size


def test_orth_where_the_factors_cancel() -> None:
    """Two rank-1 terms that almost annul each other: the Gram matrices keep what float32 would lose."""
    lora_A, lora_B, weight = make(60, 50, 1)
    A = torch.cat([lora_A, lora_A * (1 + 2**-12)]).detach().requires_grad_()
    B = torch.cat([lora_B, -lora_B], dim=1).detach().requires_grad_()
    assert_close(fast(A, B, weight)[:1], slow(A, B, weight)[:1], 1e-3)


def test_orth_is_zero_where_the_update_is_orthogonal_to_the_weight() -> None:
    weight = torch.zeros(6, 4)
    weight[:3] = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    lora_B = torch.zeros(6, 2)
    lora_B[3:] = 1.0  # outputs that W does not reach
    lora_A = torch.ones(2, 4)
    assert orth_penalty(lora_A, lora_B, weight) == 0
    assert orth_penalty(lora_A, lora_B.flip(0), weight) > 0


def test_no_gradient_and_no_nan_at_the_start_of_training() -> None:
    lora_A, _, weight = make(30, 20, 4, torch.bfloat16)
    lora_B = torch.zeros(30, 4, requires_grad=True)
    value, grad_A, grad_B = fast(lora_A, lora_B, weight)
    assert value == 0 and not grad_A.any() and not grad_B.any()


def test_orth_gradients_flow_once_and_in_the_factors_dtypes() -> None:
    lora_A, lora_B, weight = make(30, 20, 4)
    half_B = lora_B.detach().bfloat16().requires_grad_()
    (orth_penalty(lora_A, half_B, weight) * 3).backward()
    assert lora_A.grad is not None and half_B.grad is not None
    assert (lora_A.grad.dtype, half_B.grad.dtype) == (torch.float32, torch.bfloat16)
    assert_close((lora_A.grad / 3,), slow(lora_A, half_B, weight)[1:2])
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(orth_penalty(lora_A, lora_B, weight), lora_A, create_graph=True)


def test_orth_is_the_same_under_autocast() -> None:
    layer = make(200, 60, 8, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fast(*layer)
    assert all(torch.equal(a, b) for a, b in zip(inside, fast(*layer), strict=True))


def test_orth_refuses_shapes_that_do_not_fit() -> None:
    lora_A, lora_B, weight = make(30, 20, 4)
    with pytest.raises(ValueError, match=r"expected A .* W \(20, 30\)"):
        orth_penalty(lora_A, lora_B, weight.T)
    with pytest.raises(ValueError, match="expected A"):
        orth_penalty(lora_A[:3], lora_B, weight)
    with pytest.raises(ValueError, match="expected A"):
        orth_penalty(lora_A, lora_B, weight.new_empty(0))  # a ZeRO-3 weight that was not gathered


@DTYPES
def test_l2_agrees_with_float64(dtype: torch.dtype) -> None:
    A, B = (factor.detach().to(dtype).requires_grad_() for factor in make(300, 70, 4)[:2])
    assert_close(fast(A, B), slow(A, B))


def test_nothing_of_the_weights_size_is_kept_for_backward() -> None:
    lora_A, lora_B, weight = make(400, 300, 4, torch.bfloat16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        orth_penalty(lora_A, lora_B, weight)
    assert sum(kept) == lora_A.numel() + lora_B.numel()
