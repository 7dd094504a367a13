"""The paper's baselines, pure torch on one layer at a time.

Penalties, added to the loss while training (``train/regularizer.py`` sums them over the layers):
``l2`` (L2-Reg) and ``orth`` (Orth-Reg). docs/method.md has the definitions.
"""

from llava_sculpt.methods.l2 import l2_penalty
from llava_sculpt.methods.orth import orth_penalty

__all__ = ["l2_penalty", "orth_penalty"]
