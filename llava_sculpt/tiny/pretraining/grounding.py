"""The grounding loss of the pretraining: one attention head per layer learns to look at what a word names.

Without it a model of this size stays for thousands of steps on a plateau where it knows everything in the picture but
cannot pick what the question asks about. It acts on two heads only and only during pretraining.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import rotate_half

from llava_sculpt.tiny.pretraining.packing import Batch

# Head 0 of this layer looks, from a word, at the item that it names ...
MENTION_LAYER = 1
# ... and head 0 of this layer, from the end of the prompt, at the item that shows the answer.
ANSWER_LAYER = 2


class AttentionTaps:
    """Keeps queries and keys of the last forward pass of the two layers, for `loss`."""

    def __init__(self, llm: LlamaModel) -> None:
        self._llm = llm
        self._size = llm.config.hidden_size // llm.config.num_attention_heads
        self._kept: dict[tuple[int, str], torch.Tensor] = {}
        for layer in (MENTION_LAYER, ANSWER_LAYER):
            attention = llm.layers[layer].self_attn
            for name in ("q_proj", "k_proj"):
                getattr(attention, name).register_forward_hook(self._keeper(layer, name))

    def _keeper(self, layer: int, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self._kept[layer, name] = output[..., : self._size]

        return keep

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean of -log(attention that falls on the right positions) over all pointers of the batch, a scalar."""
        losses = []
        for layer, mentioned in ((MENTION_LAYER, True), (ANSWER_LAYER, False)):
            pointers = [pointer for pointer in batch.pointers if pointer.mentioned == mentioned]
            rows = torch.tensor([pointer.row for pointer in pointers])
            at = torch.tensor([pointer.position for pointer in pointers])
            right = torch.zeros(len(pointers), batch.mask.shape[-1], dtype=torch.bool)
            for i, pointer in enumerate(pointers):
                right[i, pointer.keys] = True
            query, key = (self._rotated(self._kept[layer, name], batch) for name in ("q_proj", "k_proj"))
            scores = torch.einsum("kd,knd->kn", query[rows, at], key[rows]) / self._size**0.5
            visible = scores.masked_fill(~batch.mask[rows, 0, at], float("-inf"))
            losses.append(visible.logsumexp(1) - visible.masked_fill(~right, float("-inf")).logsumexp(1))
        return torch.cat(losses).mean()

    def _rotated(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """With the rotary position embedding, as the attention uses them."""
        cos, sin = self._llm.rotary_emb(vectors, batch.positions)
        return vectors * cos + rotate_half(vectors) * sin
