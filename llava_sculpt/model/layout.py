"""The two layouts of LLaVA-1.5, Hugging Face's and the original package's: names of the weights, configuration.

Everything that reads, writes or converts weights speaks the in-memory names of `LlavaForConditionalGeneration`
(`model.language_model.layers.0.self_attn.q_proj.weight`); this is the only module that knows the others.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from llava_sculpt.errors import UserError
from llava_sculpt.records import checked

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


ROW_MULTIPLE = 64  # the embedding is filled up to, behind the rows of <image> and <pad>
# Fields that LlamaConfig has in both packages under the same name.
TEXT_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps attention_bias attention_dropout mlp_bias head_dim "
    "bos_token_id eos_token_id"
).split()
# OpenAI's CLIP ViT-L/14 at 336 px, the tower of LLaVA-1.5: what `plan` needs to know without having it.
CLIP_NAME = "openai/clip-vit-large-patch14-336"
CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SELECT = {"patch": "default", "cls_patch": "full"}


_Size = Annotated[int, Field(ge=1, le=1 << 24)]


class _Original(TypedDict):
    mm_vision_tower: str
    mm_projector_type: NotRequired[str]
    mm_patch_merge_type: NotRequired[str]
    mm_vision_select_layer: NotRequired[int]
    unfreeze_mm_vision_tower: NotRequired[bool]
    tie_word_embeddings: NotRequired[bool]
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    vocab_size: _Size
    rope_theta: NotRequired[float]
    rope_scaling: NotRequired[dict[str, Any] | None]


class _Tower(TypedDict):
    image_size: _Size
    patch_size: _Size


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is the original package's: its model types are llava_llama and, earlier, llava."""
    return isinstance(config.get("mm_vision_tower"), str) and config.get("model_type") in ("llava", "llava_llama")


def is_tied(config: dict[str, Any]) -> bool:
    """Whether lm_head is the embedding (of a config.json of either layout; LlavaConfig reads both places)."""
    return any(part.get("tie_word_embeddings") for part in (config, config.get("text_config") or {}))


def hf_config(original: dict[str, Any], tower: dict[str, Any]) -> dict[str, Any]:
    """config.json in Hugging Face layout from the original's and the vision tower's.

    Raises:
        UserError: every setting that LLaVA-1.5 does not have.
    """
    checked(original, _Original, "config.json")
    tower = tower.get("vision_config", tower)
    checked(tower, _Tower, "config.json of the vision tower")
    problems = []
    for key, expected in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_use_im_start_end", False),
        ("mm_use_im_patch_token", False),
    ):
        if original.get(key, expected) != expected:
            problems.append(f"config.json: {key} is {original[key]!r}, LLaVA-1.5 has {expected!r}")
    feature = original.get("mm_vision_select_feature", "patch")
    if feature not in list(SELECT):  # also what cannot be hashed
        problems.append(f"config.json: mm_vision_select_feature is {feature!r}, expected {' or '.join(SELECT)}")
    if "unpad" in original.get("mm_patch_merge_type", "") or original.get("image_aspect_ratio") == "anyres":
        problems.append("config.json: images in several tiles (LLaVA-1.6) are not LLaVA-1.5")
    if problems:
        raise UserError(problems)
    image, tied = original["vocab_size"], is_tied(original)
    text = {key: original[key] for key in TEXT_FIELDS if original.get(key) is not None}
    rope = {"rope_type": "default", **(original.get("rope_scaling") or {})}
    text |= {
        "model_type": "llama",
        "vocab_size": -(-(image + 2) // ROW_MULTIPLE) * ROW_MULTIPLE,
        "pad_token_id": image + 1,
        "rope_parameters": {"rope_theta": original.get("rope_theta", 10000.0), **rope},
        "tie_word_embeddings": tied,
    }
    vision = {**tower, "model_type": "clip_vision_model"}
    for key in ("architectures", "transformers_version", "dtype", "torch_dtype"):
        vision.pop(key, None)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image,
        "pad_token_id": image + 1,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": original.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT[feature],
        "tie_word_embeddings": tied,
        "torch_dtype": original.get("dtype", original.get("torch_dtype", "float16")),
        "text_config": text,
        "vision_config": vision,
    }
