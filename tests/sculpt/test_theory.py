"""The density theorems against chance itself."""

from __future__ import annotations

import math

import pytest
import torch

from llava_sculpt.sculpt import (
    density,
    density_tail_bound,
    expected_density,
    magnitude_mask,
    product_density,
)


def test_the_numbers_of_the_paper():
    for rank, percent in ((16, 14.85), (32, 27.50), (64, 47.44)):
        assert 100 * expected_density(0.1, 0.1, rank) == pytest.approx(percent, abs=0.005)
    assert expected_density(1, 1, 1) == 1 and expected_density(0, 0.5, 8) == 0
    assert density_tail_bound(0.01, 4096, 4096, 32) == pytest.approx(2 * math.exp(-2e-4 * 4096**2 / (32 * 8192)))


@pytest.mark.parametrize(("p", "q", "rank"), [(600, 400, 4), (500, 700, 16)])
def test_measured_density_is_within_the_theorem_of_the_expectation(p, q, rank):
    failure = 1e-6  # a wrong test result once in a million seeds, were the seed not fixed
    delta = math.sqrt(rank * (p + q) * math.log(2 / failure) / (2 * p * q))
    assert density_tail_bound(delta, p, q, rank) == pytest.approx(failure)
    generator = torch.Generator().manual_seed(0)
    for keep in (0.1, 0.3):
        lora_B = magnitude_mask(torch.randn(p, rank, generator=generator), keep).float()
        lora_A = magnitude_mask(torch.randn(rank, q, generator=generator), keep).float()
        expected = expected_density(keep, keep, rank)
        assert abs(product_density(lora_B, lora_A) - expected) < delta


def test_mean_over_draws_meets_the_expectation():
    generator = torch.Generator().manual_seed(1)
    draws, p, q, rank, keep = 300, 40, 30, 6, 0.2
    supports_B = torch.rand(draws, p, rank, generator=generator) < keep
    supports_A = torch.rand(draws, rank, q, generator=generator) < keep
    mean = sum(map(product_density, supports_B.float(), supports_A.float())) / draws
    # Theorem 3.2 makes one draw sub-Gaussian with variance r (p + q) / (4 p q); six standard errors of the mean.
    assert abs(mean - expected_density(keep, keep, rank)) < 6 * math.sqrt(rank * (p + q) / (4 * p * q * draws))


def test_uneven_rows_are_sparser_than_the_theorem():
    """Theorem D.1: the same number of entries, gathered in few columns of B and rows of A, cover less."""
    lora_B, lora_A = torch.zeros(200, 10), torch.zeros(10, 200)
    lora_B[:, :1] = 1
    lora_A[:1] = 1
    lora_A[1:, :] = 0
    lora_B[:100, 0] = 0
    assert product_density(lora_B, lora_A) == 0.5
    generator = torch.Generator().manual_seed(2)
    keep = torch.linspace(0, 0.4, 200)  # densities of rows of B and columns of A, mean 0.2
    measured = [
        product_density(
            (torch.rand(200, 10, generator=generator) < keep[:, None]).float(),
            (torch.rand(10, 200, generator=generator) < keep).float(),
        )
        for _ in range(20)
    ]
    assert sum(measured) / 20 < expected_density(0.2, 0.2, 10)


def test_counts_supports_not_values():
    lora_B = torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    lora_A = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # B A is 0 at (0, 0) by cancellation
    assert product_density(lora_B, lora_A) == pytest.approx(2 / 6)
    assert product_density(lora_B * 1e-30, lora_A * 1e-30) == pytest.approx(2 / 6)  # underflows as a product
    big = torch.zeros(3000, 2)
    big[2999, 1] = 1
    assert product_density(big, torch.ones(2, 3)) == pytest.approx(1 / 3000)


def test_density_is_exact():
    assert density(torch.tensor([0.0, -0.0, 1e-45, 2.0])) == 0.5
    assert density(torch.ones(3, dtype=torch.bfloat16)) == 1.0


def test_refusals():
    with pytest.raises(ValueError, match="empty"):
        density(torch.empty(0))
    with pytest.raises(ValueError, match="expected B"):
        product_density(torch.ones(3, 2), torch.ones(3, 2))
    for arguments in ((-0.1, 0.1, 4), (0.1, 1.1, 4), (0.1, 0.1, 0)):
        with pytest.raises(ValueError):
            expected_density(*arguments)
    for arguments in ((-0.1, 4, 4, 4), (0.1, 0, 4, 4), (0.1, 4, 4, 0)):
        with pytest.raises(ValueError):
            density_tail_bound(*arguments)
