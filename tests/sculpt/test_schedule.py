"""Algorithm 1: when the masks are made and hold."""

from __future__ import annotations

import math

import pytest

from llava_sculpt.sculpt import SculptSchedule


@pytest.mark.parametrize(
    ("warmup", "total", "mask_step"),
    [
        (100, 1875, 100),
        (1, 2, 1),
        (1.0, 2, 1),
        (0.05, 1875, 94),  # 93.75, rounded up
        (0.07, 100, 7),  # 7.000000000000001 in floats
        (0.001, 10, 1),
        (0.5, 2, 1),
    ],
)
def test_mask_step(warmup, total, mask_step):
    assert SculptSchedule(warmup, total).mask_step == mask_step


@pytest.mark.parametrize(
    ("warmup", "total"),
    [(0, 10), (-1, 10), (10, 10), (11, 10), (0.99, 10), (2.5, 10), (math.nan, 10), (math.inf, 10), (1, 1), (0.5, 0)],
)
def test_refuses_a_training_without_both_phases(warmup, total):
    with pytest.raises(ValueError, match="warmup_steps"):
        SculptSchedule(warmup, total)
