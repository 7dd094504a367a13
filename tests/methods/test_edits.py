"""DARE and Model Tailor on one layer, against definitions written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_sculpt.artifacts.dare import dropped_delta
from llava_sculpt.methods.tailor import BLOCK_ROWS, InputHessian, damp, scores, tailor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# DARE


def test_dare_drops_and_rescales() -> None:
    delta = random(300, 400, dtype=torch.float32)
    for drop in (0.0, 0.5, 0.9):
        dropped = dropped_delta(delta, drop, 1, "layer")
        kept = dropped != 0
        assert torch.allclose(dropped[kept], delta[kept] / (1 - drop), rtol=1e-6)
        # Within 5 standard deviations of a binomial.
        assert abs(float((~kept).float().mean()) - drop) <= 5 * (drop * (1 - drop) / delta.numel()) ** 0.5


def test_dare_is_unbiased() -> None:
    delta = random(8, 8, dtype=torch.float32)
    draws = torch.stack([dropped_delta(delta, 0.9, seed, "layer") for seed in range(4000)])
    # The spread of one draw is |delta| sqrt(p / (1 - p)) = 3 |delta|.
    assert ((draws.mean(0) - delta).abs() <= 5 * 3 * delta.abs() / 4000**0.5).all()


def test_dare_depends_on_seed_and_name_alone() -> None:
    delta = random(50, 60, dtype=torch.float32)
    first = dropped_delta(delta, 0.5, 1, "a")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(dropped_delta(delta, 0.5, 1, "a"), first)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws change
    assert not torch.equal(dropped_delta(delta, 0.5, 2, "a"), first)
    assert not torch.equal(dropped_delta(delta, 0.5, 1, "b"), first)


# Model Tailor


def layer(p: int, q: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W_pre, W_ft and correlated inputs X (q, n)."""
    w_pre = random(p, q, seed=seed) * 0.1
    w_ft = w_pre + random(p, 3, seed=seed + 1) @ random(3, q, seed=seed + 2) * 0.01
    return w_pre, w_ft, random(q, q, seed=seed + 3) @ random(q, n, seed=seed + 4)


def slow_tailor(w_pre: Tensor, w_ft: Tensor, x: Tensor, keep: float, compensate: bool) -> tuple[np.ndarray, np.ndarray]:
    """(W_new, kept) by the definition, entry by entry and row by row with NumPy."""
    pre, ft, X = w_pre.numpy(), w_ft.numpy(), x.numpy()
    H = 2 / X.shape[1] * X @ X.T
    H = H + 0.01 * np.mean(np.diag(H)) * np.eye(len(H))
    inverse = np.linalg.inv(H)
    score = np.empty_like(ft)
    for start in range(0, len(ft), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        salience, sensitivity = np.abs(ft[rows] - pre[rows]), ft[rows] ** 2 / np.diag(inverse) ** 2
        z = [(s - s.mean()) / s.std() for s in (salience, sensitivity)]
        score[rows] = 0.5 * z[0] + 0.5 * z[1]
    kept = np.zeros(ft.size, dtype=bool)
    kept[np.argsort(-score.flatten(), kind="stable")[: int(keep * ft.size)]] = True
    kept = kept.reshape(ft.shape)
    new = np.where(kept, ft, pre)
    for i in range(len(ft) if compensate else 0):
        K, D = np.flatnonzero(kept[i]), np.flatnonzero(~kept[i])
        if len(K):
            new[i, K] -= np.linalg.inv(H[np.ix_(K, K)]) @ H[np.ix_(K, D)] @ (pre[i, D] - ft[i, D])
    return new, kept


def hessian_of(x: Tensor) -> Tensor:
    hessian = InputHessian()
    for part in x.T.split(7):
        hessian.add(part.unsqueeze(0))  # as a batch of one: (1, tokens, q)
    return hessian.value()


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(("p", "q", "n", "keep"), [(20, 12, 40, 0.1), (150, 30, 100, 0.1), (9, 33, 20, 0.5)])
def test_tailor_is_the_definition(p: int, q: int, n: int, keep: float, compensate: bool) -> None:
    w_pre, w_ft, x = layer(p, q, n)
    expected, kept = slow_tailor(w_pre, w_ft, x, keep, compensate)
    result = tailor(w_pre, w_ft, hessian_of(x), keep, compensate=compensate)
    assert (result.kept.numpy() == kept).all()
    assert np.allclose(result.weight.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(result.weight[~result.kept], w_pre[~result.kept])
    for change, error in ((expected - w_ft.numpy(), result.error), (np.where(kept, 0, w_pre - w_ft), None)):
        actual = result.plain_error if error is None else error
        assert actual == pytest.approx(np.linalg.norm(change @ x.numpy()) / n**0.5, rel=1e-9)


def test_tailor_in_float32_is_close_to_float64() -> None:
    w_pre, w_ft, x = layer(60, 48, 300)
    exact = tailor(w_pre, w_ft, hessian_of(x), 0.1)
    single = tailor(w_pre.float(), w_ft.float(), hessian_of(x.float()), 0.1)
    assert (exact.kept != single.kept).float().mean() < 1e-3
    assert single.error == pytest.approx(exact.error, rel=1e-2)
    assert (single.weight - exact.weight).norm() < 1e-3 * (exact.weight - w_ft).norm()


def test_compensation_is_the_minimum_over_the_kept_entries() -> None:
    """Any other move of a kept entry makes the (damped) error larger."""
    w_pre, w_ft, x = layer(6, 10, 30)
    H = damp(hessian_of(x))
    result = tailor(w_pre, w_ft, hessian_of(x), 0.3)

    def error(w: Tensor) -> float:
        return float((((w - w_ft) @ H) * (w - w_ft)).sum())

    best = error(result.weight)
    for seed in range(20):
        assert error(result.weight + 1e-3 * random(6, 10, seed=seed) * result.kept) > best


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 24), st.integers(1, 60), st.integers(0, 99), st.floats(0.01, 1.0))
def test_compensation_does_not_raise_the_error(p: int, q: int, n: int, seed: int, keep: float) -> None:
    w_pre, w_ft, x = layer(p, q, n, seed)
    result = tailor(w_pre, w_ft, hessian_of(x), keep)
    change = result.weight - w_ft
    # The damped error is what is minimised; the plain one can exceed it by the damping alone.
    damping = float((damp(hessian_of(x)) - hessian_of(x)).diagonal().mean())
    spent = damping / 2 * float(torch.where(result.kept, 0, w_pre - w_ft).square().sum())
    assert result.error**2 <= result.plain_error**2 + spent + 1e-12
    assert change.isfinite().all()


def test_compensation_lowers_the_error_of_correlated_inputs() -> None:
    result = tailor(*layer(100, 60, 500)[:2], hessian_of(layer(100, 60, 500)[2]), 0.1)
    assert result.error < 0.95 * result.plain_error


def test_salience_and_sensitivity_both_count() -> None:
    w_pre, w_ft, x = layer(20, 10, 50)
    H = damp(hessian_of(x))
    base = scores(w_pre, w_ft, H)
    changed = w_pre.clone()
    changed[0, 0] = w_ft[0, 0] - 10  # a large change of an entry raises its own score most
    assert (scores(changed, w_ft, H) - base).argmax() == 0
    louder = x.clone()
    louder[3] *= 100  # entries that read a loud input are costly to remove
    assert scores(w_pre, w_ft, damp(hessian_of(louder)))[:, 3].mean() > base[:, 3].mean()


def test_layers_that_did_not_change_or_saw_nothing() -> None:
    w_pre, w_ft, x = layer(20, 10, 50)
    same = tailor(w_pre, w_pre, hessian_of(x), 0.1)
    assert torch.equal(same.weight, w_pre) and same.error == same.plain_error == 0
    silent = tailor(w_pre, w_ft, hessian_of(x * 0), 0.1)
    assert silent.weight.isfinite().all() and silent.plain_error == 0
    with pytest.raises(ValueError, match="no calibration"):
        InputHessian().value()
    with pytest.raises(ValueError, match="NaN"):
        tailor(w_pre, w_ft * float("nan"), hessian_of(x), 0.1)
