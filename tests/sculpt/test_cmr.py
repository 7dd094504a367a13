"""CMR against autograd of its plain float64 formula, and what it must not keep."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sculpt.sculpt import (
    Retention,
    conflict_penalty,
    conflict_terms,
    penalty_and_gradients,
    prepared_penalty,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NORMS = ["fro", "l1"]


def make(p: int, q: int, r: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(p, q, generator=generator) * 0.02).to(dtype)
    lora_A = (torch.rand(r, q, generator=generator) - 0.5).requires_grad_()
    lora_B = (torch.randn(p, r, generator=generator) * 1e-3).requires_grad_()
    return lora_A, lora_B, weight


def slow_penalty(lora_A, lora_B, weight, omega=1.0, norm="fro"):
    """Eq. 6-8 and 10 as written, in float64: value and both gradients."""
    A, B = (x.detach().double().requires_grad_() for x in (lora_A, lora_B))
    W = weight.detach().double()
    M = torch.tanh(omega * (1 / torch.log(W.abs() / W.norm() + 1e-15)).abs())
    X = M * (B @ A)
    value = X.square().sum().sqrt() if norm == "fro" else X.abs().sum()
    return (value.detach(), *torch.autograd.grad(value, (A, B)))


def fast_penalty(lora_A, lora_B, weight, omega=1.0, norm="fro"):
    value = conflict_penalty(lora_A, lora_B, weight, omega, norm)
    return (value.detach(), *torch.autograd.grad(value, (lora_A, lora_B)))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach().double() - expected).norm() / expected.norm())


def assert_close(actual, expected, tolerance=1e-6):
    for name, a, e in zip(("value", "grad_A", "grad_B"), actual, expected, strict=True):
        assert relative_error(a, e) <= tolerance, name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(dtype, norm):
    case = make(384, 200, 16, dtype)
    assert_close(fast_penalty(*case, norm=norm), slow_penalty(*case, norm=norm))


@settings(max_examples=40, deadline=None)
@given(
    p=st.integers(1, 300),
    q=st.integers(1, 40),
    r=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    omega=st.sampled_from([0.1, 1.0, 5.0]),
    zero_rows=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(p, q, r, dtype, omega, zero_rows, seed):
    lora_A, lora_B, weight = make(p, q, r, dtype, seed)
    if zero_rows and p > 1:
        weight[::2] = 0
    case = (lora_A, lora_B, weight, omega)
    # Frobenius only: the sign of an entry of BA that cancels to 1e-9 of its terms is decided by float32 rounding.
    assert_close(fast_penalty(*case), slow_penalty(*case), tolerance=5e-6 if p * q < 100 else 1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tile_rows", [1, 7, 50, 128, 1000])
def test_tiles_do_not_matter(tile_rows, norm):
    lora_A, lora_B, weight = make(150, 60, 8, torch.bfloat16)
    retention = Retention.of(weight)
    whole = conflict_terms(lora_A, lora_B, weight, retention, norm)
    tiled = conflict_terms(lora_A, lora_B, weight, retention, norm, tile_rows)
    for a, b in zip(whole, tiled, strict=True):
        assert relative_error(a, b.double()) <= 1e-6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_add_up_to_the_matrix(dtype, norm):
    """What a flat shard is: a partial first row, whole rows, a partial last row; also an empty one."""
    lora_A, lora_B, weight = make(40, 24, 4, dtype)
    A, B, retention = lora_A.detach(), lora_B.detach(), Retention.of(weight)
    value = torch.zeros((), dtype=torch.float64)
    grad_A, grad_B = torch.zeros_like(A), torch.zeros_like(B)
    for rows, columns in [
        (slice(0, 9), slice(0, 24)),
        (slice(9, 10), slice(0, 5)),
        (slice(9, 10), slice(5, 24)),
        (slice(10, 10), slice(0, 24)),
        (slice(10, 40), slice(0, 24)),
    ]:
        part = conflict_terms(A[:, columns], B[rows], weight[rows, columns], retention, norm)
        value += part[0]
        grad_A[:, columns] += part[1]
        grad_B[rows] += part[2]
    if norm == "fro":
        value = value.sqrt()
        grad_A, grad_B = grad_A / value, grad_B / value
    assert_close((value, grad_A, grad_B), slow_penalty(lora_A, lora_B, weight, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_exactly_zero_where_the_adapter_is_zero(zero, norm):
    lora_A, lora_B, weight = make(130, 20, 4, torch.bfloat16)
    with torch.no_grad():
        if zero != "B":
            lora_A.zero_()
        if zero != "A":
            lora_B.zero_()
    for x in fast_penalty(lora_A, lora_B, weight, norm=norm):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15])
def test_tiny_and_huge_adapters(size, norm):
    """Squares of these leave float32; the penalty and its gradients do not."""
    lora_A, lora_B, weight = make(64, 32, 4)
    lora_B = (lora_B.detach() * size).requires_grad_()
    assert_close(fast_penalty(lora_A, lora_B, weight, norm=norm), slow_penalty(lora_A, lora_B, weight, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_adapters_are_computed_in_float32(dtype, norm):
    """Only the last cast of the gradients rounds: elementwise within one unit of the dtype, value to 1e-6."""
    lora_A, lora_B, weight = make(300, 80, 8, torch.bfloat16)
    lora_A, lora_B = (x.detach().to(dtype).requires_grad_() for x in (lora_A, lora_B))
    value, grad_A, grad_B = fast_penalty(lora_A, lora_B, weight, norm=norm)
    expected, expected_A, expected_B = slow_penalty(lora_A, lora_B, weight, norm=norm)
    assert value.dtype == torch.float32 and relative_error(value, expected) <= 1e-6
    assert grad_A.dtype == grad_B.dtype == dtype
    info = torch.finfo(dtype)
    for actual, exact in ((grad_A, expected_A), (grad_B, expected_B)):
        float32_error = 1e-6 * float(exact.abs().max())
        rounding = max(float32_error, info.tiny * info.eps)  # the spacing of fp16's subnormals
        torch.testing.assert_close(actual.double(), exact, rtol=info.eps, atol=rounding)


def test_autocast_and_fast_matmul_settings_change_nothing():
    case = make(200, 100, 8, torch.bfloat16)
    expected = fast_penalty(*case)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = fast_penalty(*case)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_upstream_gradients_scale_and_accumulate():
    lora_A, lora_B, weight = make(30, 20, 2)
    _, grad_A, grad_B = fast_penalty(lora_A, lora_B, weight)
    for _ in range(2):
        (conflict_penalty(lora_A, lora_B, weight) * 0.5).backward()
    torch.testing.assert_close(lora_A.grad, grad_A)
    torch.testing.assert_close(lora_B.grad, grad_B)
    assert weight.grad is None


def test_frozen_factors_and_no_grad():
    lora_A, lora_B, weight = make(30, 20, 2)
    conflict_penalty(lora_A.detach(), lora_B, weight).backward()
    assert lora_A.grad is None and lora_B.grad is not None
    with torch.no_grad():
        assert not conflict_penalty(lora_A, lora_B, weight).requires_grad


def test_a_gradient_step_lowers_the_penalty():
    for norm in NORMS:
        lora_A, lora_B, weight = make(50, 30, 3)
        before, _, grad_B = fast_penalty(lora_A, lora_B, weight, norm=norm)
        step = 1e-2 * before / grad_B.square().sum()
        assert conflict_penalty(lora_A, lora_B - step * grad_B, weight, norm=norm) < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_of_the_size_of_the_matrix_is_kept(dtype):
    p, q, r = 512, 256, 4
    lora_A, lora_B, weight = make(p, q, r, dtype)
    saved = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append((x.numel(), x.untyped_storage().nbytes()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = conflict_penalty(lora_A, lora_B, weight)
    assert sum(numel for numel, _ in saved) == r * (p + q)
    assert sum(nbytes for _, nbytes in saved) == 4 * r * (p + q)  # no view of something bigger
    watch = weakref.ref(weight)
    del weight
    gc.collect()
    assert watch() is None  # the graph does not keep W alive either
    value.backward()


def test_second_derivatives_are_refused():
    lora_A, lora_B, weight = make(20, 10, 2)
    value = conflict_penalty(lora_A, lora_B, weight)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(value, lora_A, create_graph=True)


def test_prepared_constants_give_the_same_result():
    lora_A, lora_B, weight = make(60, 40, 4, torch.bfloat16)
    prepared = prepared_penalty(lora_A, lora_B, weight, Retention.of(weight, 0.5))
    assert torch.equal(prepared, conflict_penalty(lora_A, lora_B, weight, 0.5))


@pytest.mark.parametrize("norm", ["fro", "l1"])
def test_value_and_gradients_at_once_are_those_of_autograd(norm):
    lora_A, lora_B, weight = make(60, 40, 4, torch.bfloat16)
    retention = Retention.of(weight)
    penalty = prepared_penalty(lora_A, lora_B, weight, retention, norm)
    value, grad_A, grad_B = penalty_and_gradients(lora_A, lora_B, weight, retention, norm)
    assert torch.equal(value, penalty) and not value.requires_grad
    for mine, gradient in zip((grad_A, grad_B), torch.autograd.grad(penalty, (lora_A, lora_B)), strict=True):
        assert torch.equal(mine, gradient)


def test_bad_input_is_named():
    lora_A, lora_B, weight = make(20, 10, 2)
    with pytest.raises(ValueError, match=r"expected A .* W \(10, 20\)"):
        conflict_penalty(lora_A, lora_B, weight.t())
    with pytest.raises(ValueError, match="expected A"):
        conflict_penalty(lora_B, lora_A, weight)
    with pytest.raises(ValueError, match="matrices"):
        conflict_penalty(torch.empty(0), torch.empty(0), weight)  # ZeRO-3 parameters that were not gathered
    with pytest.raises(ValueError, match="norm"):
        conflict_penalty(lora_A, lora_B, weight, norm="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="omega"):
        conflict_penalty(lora_A, lora_B, weight, omega=0)
    with pytest.raises(ValueError, match="one device"):
        conflict_penalty(lora_A, lora_B, weight.to("meta"))


def test_bf16_formulation_would_not_do():
    """The released way (everything in the weight's bf16) misses by 1e-3; this is what float32 tiles are for."""
    lora_A, lora_B, weight = make(512, 512, 16, torch.bfloat16)
    expected = slow_penalty(lora_A, lora_B, weight)[0]
    M = torch.tanh((1 / torch.log(weight.abs() / weight.norm() + 1e-15)).abs())
    released = (M * (lora_B.bfloat16() @ lora_A.bfloat16())).norm()
    assert relative_error(released, expected) > 1e-4
    assert relative_error(conflict_penalty(lora_A, lora_B, weight), expected) < 1e-7
