"""The names of LLaVA-1.5's weights: in memory (Hugging Face), on disk (several dialects), in the original package.

Everything that reads, writes or converts weights speaks the in-memory names of `LlavaForConditionalGeneration`
(`model.language_model.layers.0.self_attn.q_proj.weight`); this is the only module that knows the others.
"""

from __future__ import annotations

import re

LANGUAGE = "model.language_model."
PROJECTOR = "model.multi_modal_projector."
TOWER = "model.vision_tower."
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"

# On disk -> in memory. transformers wrote `language_model.model.` and `vision_tower.vision_model.` up to 4.51 (the
# published llava-hf files), and its `save_pretrained` still writes the first today. The first rule that fits counts.
_FROM_DISK = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), LANGUAGE),
    (re.compile(r"^(model\.)?vision_tower\.vision_model\."), TOWER),
    (re.compile(r"^vision_tower\."), TOWER),
    (re.compile(r"^multi_modal_projector\."), PROJECTOR),
)


def memory_name(on_disk: str) -> str:
    """In-memory name of a tensor in a Hugging Face checkpoint, whichever version of transformers wrote it."""
    for pattern, prefix in _FROM_DISK:
        if pattern.match(on_disk):
            return pattern.sub(prefix, on_disk, count=1)
    return on_disk
