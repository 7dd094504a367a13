"""How many questions a GPU's free memory takes at a time."""

from __future__ import annotations

from typing import Any

import torch

# Beyond so many a batch wins little: the weights are read once for all of them, and rows of other lengths are padded.
_MOST = 64
_SHARE = 0.8  # of the free memory; the rest is for fragmentation and what kernels need for themselves


def batch_that_fits(config: Any, dtype: torch.dtype, tokens: int, free: int) -> int:
    """Questions that are answered together in `free` bytes: at least 1, at most 64.

    Args:
        config: of the LLaVA model.
        tokens: of the longest question with its image and its answer.
    """
    cache, working = bytes_per_question(config, dtype, tokens)
    return max(1, min(_MOST, int(_SHARE * free / (cache + working))))


def bytes_per_question(config: Any, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """The key-value cache of a question, and the largest working memory: reading its image, and its logits.

    Reading an image keeps the states of all layers of the tower (LLaVA takes them from the last but one), then in the
    language model about eight states and three of the wider ones of a layer's MLP, for every token. While a layer's
    cache grows, its old and its new one exist.
    """
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layer = 2 * text.num_key_value_heads * head * tokens
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    tower = patches * ((vision.num_hidden_layers + 8) * vision.hidden_size + 2 * vision.intermediate_size)
    language = patches * (8 * text.hidden_size + 3 * text.intermediate_size)
    logits = text.vocab_size * 4
    return text.num_hidden_layers * layer * dtype.itemsize, (layer + tower + language) * dtype.itemsize + logits


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU: free ones, and those PyTorch holds without using them."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
