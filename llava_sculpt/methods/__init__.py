"""The paper's baselines, each on the tensors of one layer. Two interfaces:

- a penalty for the loss, differentiable in A and B (``l2``: L2-Reg, ``orth``: Orth-Reg), named ``NAME_penalty``;
  ``train/regularizer.py`` finds it by its name and sums it over the layers;
- an edit of what training has left (``post_prune``, ``dare``, ``model_tailor``); ``artifacts/edit.py`` and
  ``artifacts/model_tailor.py`` apply it to a trained adapter.

docs/method.md has the definitions.
"""

from llava_sculpt.methods.dare import DROP, dropped_delta
from llava_sculpt.methods.l2 import l2_penalty
from llava_sculpt.methods.orth import orth_penalty
from llava_sculpt.methods.post_prune import post_pruned
from llava_sculpt.methods.tailor import InputHessian, Tailored, tailor

__all__ = [
    "DROP",
    "InputHessian",
    "Tailored",
    "dropped_delta",
    "l2_penalty",
    "orth_penalty",
    "post_pruned",
    "tailor",
]
