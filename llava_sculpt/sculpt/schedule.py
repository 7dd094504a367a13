"""When things happen in Algorithm 1.

Before the forward pass of optimizer step t: if t == mask_step the masks are made from the current A and B; if
t >= mask_step they are applied. Every step, dense or sparse, then minimises task loss + CMR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class SculptSchedule:
    """Algorithm 1 over ``total_steps`` optimizer steps, counted from 0.

    Attributes:
        warmup_steps: dense steps before the masks are made: a whole number of steps when >= 1, a fraction of
            training when < 1 (rounded up, so at least 1 step).
        total_steps: optimizer steps of the whole training.

    Raises:
        ValueError: no dense step before the masks, or no sparse step after them.
    """

    warmup_steps: float
    total_steps: int

    def __post_init__(self) -> None:
        if not 0 < self.warmup_steps < math.inf:
            raise ValueError(f"warmup_steps must be positive, got {self.warmup_steps}")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"warmup_steps >= 1 must be a whole number of steps, got {self.warmup_steps}")
        if self.mask_step >= self.total_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} makes the masks before step {self.mask_step}, "
                f"but training ends after {self.total_steps} steps"
            )

    @property
    def mask_step(self) -> int:
        """T_warmup: the step before whose forward pass the masks are made and first applied."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        # Read as the decimal number it prints as: 0.07 of 100 steps is 7, not ceil(7.000000000000001) = 8.
        return math.ceil(Fraction(str(float(self.warmup_steps))) * self.total_steps)
