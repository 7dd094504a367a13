"""config.json and preprocessor_config.json of a LLaVA-1.5 base: what counts in them, checked. No more is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from llava_sculpt.errors import UserError
from llava_sculpt.records import checked, read_checked

# Above any LLaVA, and small enough that a model of that size can be described.
_Size = Annotated[int, Field(ge=1, le=1 << 24)]
_Layers = Annotated[int, Field(ge=1, le=512)]
_Token = Annotated[int, Field(ge=0, le=1 << 24)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Small = Annotated[float, Field(gt=0, le=1)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Dtype = Literal["float16", "bfloat16", "float32", "float64"]


class _Rope(TypedDict):
    rope_theta: NotRequired[_Above0]
    rope_type: NotRequired[str]
    factor: NotRequired[_Above0]


class _Text(TypedDict):
    model_type: NotRequired[Literal["llama"]]
    vocab_size: NotRequired[_Size]
    hidden_size: NotRequired[_Size]
    intermediate_size: NotRequired[_Size]
    num_hidden_layers: NotRequired[_Layers]
    num_attention_heads: NotRequired[_Size]
    num_key_value_heads: NotRequired[_Size | None]
    head_dim: NotRequired[_Size | None]
    hidden_act: NotRequired[str]
    max_position_embeddings: NotRequired[_Size]
    rms_norm_eps: NotRequired[_Small]
    rope_theta: NotRequired[_Above0]
    rope_scaling: NotRequired[_Rope | None]
    rope_parameters: NotRequired[_Rope | None]
    attention_bias: NotRequired[bool]
    attention_dropout: NotRequired[_Fraction]
    mlp_bias: NotRequired[bool]
    tie_word_embeddings: NotRequired[bool]
    pad_token_id: NotRequired[_Token | None]
    bos_token_id: NotRequired[_Token | None]
    eos_token_id: NotRequired[_Token | None]


class _Vision(TypedDict):
    model_type: NotRequired[Literal["clip_vision_model"]]
    image_size: Annotated[int, Field(ge=1, le=1 << 14)]
    patch_size: Annotated[int, Field(ge=1, le=1 << 14)]
    hidden_size: NotRequired[_Size]
    intermediate_size: NotRequired[_Size]
    num_hidden_layers: NotRequired[_Layers]
    num_attention_heads: NotRequired[_Size]
    num_channels: NotRequired[Literal[3]]
    projection_dim: NotRequired[_Size]
    hidden_act: NotRequired[str]
    layer_norm_eps: NotRequired[_Small]
    attention_dropout: NotRequired[_Fraction]


class _Llava(TypedDict):
    model_type: Literal["llava"]
    text_config: NotRequired[_Text]
    vision_config: _Vision
    image_token_id: NotRequired[_Token]
    image_token_index: NotRequired[_Token]
    pad_token_id: NotRequired[_Token | None]
    projector_hidden_act: NotRequired[str]
    multimodal_projector_bias: NotRequired[bool]
    vision_feature_layer: NotRequired[int]
    vision_feature_select_strategy: NotRequired[Literal["default", "full"]]
    tie_word_embeddings: NotRequired[bool]
    dtype: NotRequired[_Dtype | None]
    torch_dtype: NotRequired[_Dtype | None]
    quantization_config: NotRequired[None]


class _Side(TypedDict):
    height: _Size
    width: _Size


class _Preprocessor(TypedDict):
    image_mean: Annotated[list[_Finite], Field(min_length=3, max_length=3)]
    image_std: Annotated[list[_Above0], Field(min_length=3, max_length=3)]
    crop_size: _Side | int
    size: dict[str, _Size] | int
    resample: NotRequired[Annotated[int, Field(ge=0, le=5)]]
    rescale_factor: NotRequired[_Above0]
    do_resize: NotRequired[Literal[True]]
    do_center_crop: NotRequired[Literal[True]]
    do_rescale: NotRequired[Literal[True]]
    do_normalize: NotRequired[Literal[True]]
    do_convert_rgb: NotRequired[bool | None]


def check_llava_config(config: dict[str, Any], source: Path) -> None:
    """Refuse a config.json in Hugging Face layout whose fields are not what they should be or do not go together.

    Raises:
        UserError: everything that is wrong with it.
    """
    known = checked(config, _Llava, source)
    vision, text = known["vision_config"], known.get("text_config", {})
    problems = []
    image = known.get("image_token_id", known.get("image_token_index"))
    if image is None:
        problems.append("image_token_index is missing: not a LLaVA-1.5 checkpoint")
    elif image in (known.get("pad_token_id"), text.get("pad_token_id")):
        problems.append(f"image and padding token are both {image}")
    if vision["image_size"] % vision["patch_size"]:
        problems.append(f"vision_config: {vision['image_size']} pixels are no multiple of {vision['patch_size']}")
    layer, layers = known.get("vision_feature_layer", -2), vision.get("num_hidden_layers", 24)
    if not -layers - 1 <= layer <= layers:
        problems.append(f"vision_feature_layer is {layer}, the tower has {layers}")
    for part, name in ((text, "text_config"), (vision, "vision_config")):
        hidden, heads = part.get("hidden_size"), part.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and hidden % heads and not part.get("head_dim"):
            problems.append(f"{name}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    heads, groups = text.get("num_attention_heads", 32), text.get("num_key_value_heads")
    if groups and heads % groups:
        problems.append(f"text_config: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if (text.get("head_dim") or 2) % 2:
        problems.append("text_config: head_dim is odd")
    if problems:
        raise UserError([f"{source}: {problem}" for problem in problems])


def read_preprocessor(file: Path, image_size: int) -> dict[str, Any]:
    """What preprocessor_config.json says of the pixels, in one spelling.

    Raises:
        UserError: everything that is wrong with it; settings that do not give squares of `image_size` pixels a side.
    """
    known = read_checked(file, _Preprocessor)
    crop = known["crop_size"]
    sides = {crop} if isinstance(crop, int) else {crop["height"], crop["width"]}
    if sides != {image_size}:
        raise UserError(f"{file}: crop_size is {crop}, the vision tower in config.json takes {image_size} pixels")
    size = known["size"]
    scaled = [size] if isinstance(size, int) else sorted(size.values())
    if not scaled or scaled[0] < image_size:
        raise UserError(f"{file}: size is {size}, smaller than crop_size")
    return {
        "mean": known["image_mean"],
        "std": known["image_std"],
        "size": scaled,
        "resample": known.get("resample", 3),
        "rescale": round(known.get("rescale_factor", 1 / 255), 9),
    }


def known_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a checked config.json that describes the model; what else the file may hold changes nothing."""
    known: dict[str, Any] = _only(config, _Llava)
    known |= {"text_config": _only(config.get("text_config", {}), _Text) | {"model_type": "llama"}}
    known |= {"vision_config": _only(config["vision_config"], _Vision) | {"model_type": "clip_vision_model"}}
    for key in ("dtype", "torch_dtype", "quantization_config"):
        known.pop(key, None)
    return known


def _only(config: dict[str, Any], kind: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in kind.__annotations__}


# Which rows there are beside the vocabulary and where padding is differs between layouts.
_NOT_COMPUTED = frozenset(
    "vocab_size pad_token_id bos_token_id eos_token_id attention_dropout max_position_embeddings projection_dim".split()
)


def computation(config: dict[str, Any]) -> list[Any]:
    """What a config.json says of the computation, with the defaults of what it leaves out."""
    from transformers import LlavaConfig

    known: Any = LlavaConfig.from_dict(known_config(config))
    parts = [
        {key: getattr(part, key, None) for key in kind.__annotations__ if key not in _NOT_COMPUTED}
        for part, kind in ((known.text_config, _Text), (known.vision_config, _Vision))
    ]
    top = [
        known.image_token_id,
        known.vision_feature_layer,
        known.vision_feature_select_strategy,
        known.projector_hidden_act,
        known.multimodal_projector_bias,
    ]
    return [top, *parts]
