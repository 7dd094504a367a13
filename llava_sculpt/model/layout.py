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


def disk_name(name: str) -> str:
    """The name of a weight in llava-hf's published files, which every version of transformers and vLLM reads."""
    if name == HEAD:
        return "language_model.lm_head.weight"
    if name.startswith(LANGUAGE):
        return f"language_model.model.{name.removeprefix(LANGUAGE)}"
    return name.replace(TOWER, "vision_tower.vision_model.", 1).removeprefix("model.")


# In memory -> original package. The original's tower is a CLIPVisionModel inside a wrapper of the same name.
_TO_ORIGINAL = (
    (LANGUAGE, "model."),
    (f"{PROJECTOR}linear_1.", "model.mm_projector.0."),
    (f"{PROJECTOR}linear_2.", "model.mm_projector.2."),
    (TOWER, "model.vision_tower.vision_tower.vision_model."),
)


def original_name(name: str) -> str:
    """The original package's name of an in-memory name (also of a weight's LoRA matrices)."""
    for ours, theirs in _TO_ORIGINAL:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def name_of_original(theirs: str) -> str:
    """In-memory name of one of the original package's names; the inverse of `original_name`."""
    # The language model's prefix is the shortest and fits every other name as well.
    for ours, prefix in (*_TO_ORIGINAL[1:], _TO_ORIGINAL[0]):
        if theirs.startswith(prefix):
            return ours + theirs.removeprefix(prefix)
    return theirs


def is_buffer(name: str) -> bool:
    """Constants that older versions of transformers saved among the weights and newer ones compute."""
    return name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))


_PEFT = "base_model.model."


def original_key(key: str) -> str:
    """A key of adapter_model.safetensors (or `base_model.model.` plus any weight) as the original package has it."""
    return _PEFT + original_name(key.removeprefix(_PEFT))


def key_of_original(key: str) -> str:
    """The inverse of `original_key`."""
    return _PEFT + name_of_original(key.removeprefix(_PEFT))
