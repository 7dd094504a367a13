"""Eq. 6-7 against their float64 formula, and finite wherever the weight is."""

from __future__ import annotations

import math

import pytest
import torch

from llava_sculpt.sculpt import Retention, frobenius_norm, retention_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def slow_retention(weight: torch.Tensor, omega: float) -> torch.Tensor:
    weight = weight.double()
    return torch.tanh(omega * (1 / torch.log(weight.abs() / weight.norm() + 1e-15)).abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("omega", [0.25, 1.0, 3.0])
def test_matches_the_formula(dtype, omega):
    weight = (torch.randn(67, 45) * 0.02).to(dtype)
    weight[3] = 0
    weight[5, 7] = 2.0  # M near 1
    mask = retention_mask(weight, omega)
    assert mask.dtype == torch.float32 and mask.shape == weight.shape
    torch.testing.assert_close(mask.double(), slow_retention(weight, omega), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_magnitude(dtype):
    weight = torch.arange(32768, dtype=torch.int16).view(dtype)
    weight = weight[weight.isfinite()]
    weight = torch.cat([weight, -weight])
    mask = retention_mask(weight)
    assert torch.equal(*mask.chunk(2))
    torch.testing.assert_close(mask.double(), slow_retention(weight, 1.0), rtol=1e-6, atol=0)


def test_larger_weights_are_retained_more():
    mask = retention_mask(torch.tensor([0.0, 1e-3, 1e-2, 0.1, 1.0]))
    assert (mask.diff() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_at_the_edges(dtype):
    info = torch.finfo(dtype)
    smallest, largest = info.smallest_normal * info.eps, info.max
    if dtype == torch.float64:  # the norm is a float64 itself, and must be a normal one to be exact
        smallest, largest = info.smallest_normal, info.max / 8
    edges = {
        "all zero": torch.zeros(3, 4, dtype=dtype),
        "one entry, log = 0": torch.ones(1, 1, dtype=dtype),
        "one non-zero entry": torch.eye(1, 5, dtype=dtype),
        "subnormals": torch.full((3, 4), smallest, dtype=dtype),
        "largest": torch.full((3, 4), largest, dtype=dtype),
        "both": torch.tensor([[smallest, largest], [0, -largest]], dtype=dtype),
    }
    for name, weight in edges.items():
        for omega in (1e-3, 1.0, 1e3):
            mask = retention_mask(weight, omega)
            assert mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1, name
    floor = math.tanh(1 / -math.log(1e-15))
    assert torch.allclose(retention_mask(edges["all zero"]), torch.tensor(floor))
    assert retention_mask(edges["one entry, log = 0"]).item() == 1
    expected = math.tanh(1 / math.log(math.sqrt(12)))
    assert torch.allclose(retention_mask(edges["subnormals"]), torch.tensor(expected))
    assert torch.allclose(retention_mask(edges["largest"]), torch.tensor(expected))


def test_float8_weights_are_accepted():
    weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    torch.testing.assert_close(retention_mask(weight).double(), slow_retention(weight, 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_accumulated_in_float64(dtype):
    weight = torch.full((2100, 1024), 0.1).to(dtype)  # float32 running sums of 2 million equal squares drift
    expected = float(weight[0, 0].double()) * math.sqrt(weight.numel())
    assert frobenius_norm(weight) == pytest.approx(expected, rel=1e-12)


def test_norm_of_shards_and_other_shapes():
    weight = torch.randn(33, 17)
    parts = [frobenius_norm(part) for part in (weight.flatten()[:100], weight.flatten()[100:], weight[:0])]
    assert math.hypot(*parts) == pytest.approx(frobenius_norm(weight), rel=1e-12)
    assert frobenius_norm(weight.t()) == pytest.approx(frobenius_norm(weight), rel=1e-12)
    assert frobenius_norm(torch.tensor(-3.0)) == 3.0


def test_a_block_has_the_mask_of_the_whole_matrix():
    for dtype in DTYPES:
        weight = torch.randn(20, 12).to(dtype)
        retention = Retention.of(weight, 0.5)
        whole = retention_mask(weight, 0.5)
        assert torch.equal(retention.of_block(weight[3:9, 2:7]), whole[3:9, 2:7])
        assert torch.equal(retention.of_block(weight.t()), whole.t())
        assert torch.equal(retention.of_block(weight[7, 5:]), whole[7, 5:])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_refuses_weights_that_are_not_finite(bad):
    for dtype in DTYPES:
        weight = torch.ones(3, 3, dtype=dtype)
        weight[1, 1] = bad
        with pytest.raises(ValueError, match="inf or NaN"):
            retention_mask(weight)


def test_refuses_other_bad_input():
    for omega in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="omega"):
            retention_mask(torch.ones(2, 2), omega)
    with pytest.raises(ValueError, match="empty"):
        retention_mask(torch.empty(0))
    with pytest.raises(ValueError, match="prepared for"):
        Retention.of(torch.ones(2, 2)).of_block(torch.ones(2, 2).bfloat16())
