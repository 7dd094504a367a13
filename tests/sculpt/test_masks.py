"""SRR: exact counts, deterministic ties, and masks that really zero."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sculpt.sculpt import kept_count, magnitude_mask


def slow_mask(x: torch.Tensor, kept: int) -> torch.Tensor:
    magnitudes = x.double().abs().flatten().tolist()
    order = sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))
    mask = torch.zeros(len(magnitudes), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask.view(x.shape)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 9),
    percent=st.integers(1, 100),
    levels=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_keeps_exactly_the_largest_and_the_first_of_ties(rows, columns, percent, levels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).to(dtype)
    mask = magnitude_mask(x, percent / 100)
    kept = percent * rows * columns // 100
    assert mask.dtype == torch.bool and mask.shape == x.shape
    assert int(mask.sum()) == kept
    assert torch.equal(mask, slow_mask(x, kept))


def test_density_is_the_decimal_number_it_prints_as():
    assert math.floor(0.29 * 100) == 28  # what floats would keep
    assert kept_count(100, 0.29) == 29
    for percent in range(1, 101):
        for numel in (100, 1000, 4096 * 64, 11008 * 64):
            assert kept_count(numel, percent / 100) == math.floor(Fraction(percent, 100) * numel)
    assert kept_count(100, 1e-05) == 0


def test_count_is_exact_at_the_paper_size():
    x = torch.randn(11008, 64).bfloat16()  # thousands of ties at the threshold
    mask = magnitude_mask(x, 0.1)
    assert int(mask.sum()) == 70451
    assert x.abs()[mask].min() >= x.abs()[~mask].max()


def test_zeros_infinities_and_layout():
    assert magnitude_mask(torch.zeros(4, 5), 0.3).flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert magnitude_mask(torch.tensor([1.0, -math.inf, 2.0]), 0.34).tolist() == [False, True, False]
    assert magnitude_mask(torch.tensor([-0.0, 0.0, -0.0]), 0.5).tolist() == [True, False, False]
    assert magnitude_mask(torch.randn(3, 3), 1.0).all()
    assert not magnitude_mask(torch.randn(3, 3), 0.1).any()
    x = torch.randn(6, 4)
    assert torch.equal(magnitude_mask(x.t().contiguous().t(), 0.5), magnitude_mask(x, 0.5))


def test_works_under_deterministic_algorithms_and_on_parameters():
    x = torch.nn.Parameter(torch.randn(8, 8))
    torch.use_deterministic_algorithms(True)
    try:
        mask = magnitude_mask(x, 0.25)
    finally:
        torch.use_deterministic_algorithms(False)
    assert int(mask.sum()) == 16 and not mask.requires_grad


@pytest.mark.parametrize("density", [0, -0.1, 1.5, math.nan])
def test_refuses_impossible_densities(density):
    with pytest.raises(ValueError, match="density"):
        magnitude_mask(torch.ones(3), density)


def test_refuses_nan_and_empty():
    with pytest.raises(ValueError, match="NaN"):
        magnitude_mask(torch.tensor([1.0, math.nan]), 0.5)
    with pytest.raises(ValueError, match="empty"):
        magnitude_mask(torch.empty(0), 0.5)
