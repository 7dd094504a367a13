"""The learning rate schedule of the pretraining."""

from __future__ import annotations

import math

WARMUP = 0.03  # share of all steps


def cosine(step: int, steps: int) -> float:
    """Factor in (0, 1]: linear warm-up, then a half cosine to 0. `step` counts from 0."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
