"""Checkpoints of the original LLaVA package (liuhaotian/llava-v1.5-7b, -13b) brought into Hugging Face layout.

Everything here works in that layout, so an original checkpoint is converted once: by `llava-sculpt convert`, or into
the user's cache when training or evaluation is given one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.model.layout import EMBEDDING, HEAD, TOWER, disk_name, is_buffer, name_of_original
from llava_sculpt.model.processor import complete_processor
from llava_sculpt.model.shards import (
    Stored,
    check_shards,
    copy_files,
    fingerprint,
    in_shards,
    read_config,
    stored_tensors,
    weight_files,
    write_folder,
)
from llava_sculpt.records import write_json

TOWER_FOLDER = "vision_tower"  # inside an original checkpoint that `convert --to original` wrote
ROWS_FILE = "hf_rows.safetensors"  # there too: the rows of <image> and <pad>, which the original does not have
ROW_MULTIPLE = 64

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


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is the original package's: its model types are llava_llama and, earlier, llava."""
    return "mm_vision_tower" in config and config.get("model_type") in ("llava", "llava_llama")


def hf_config(original: dict[str, Any], tower: dict[str, Any]) -> dict[str, Any]:
    """config.json in Hugging Face layout from the original's and the vision tower's.

    Raises:
        UserError: every setting that LLaVA-1.5 does not have.
    """
    problems = []
    for key, expected in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_use_im_start_end", False),
        ("mm_use_im_patch_token", False),
        ("tie_word_embeddings", False),
    ):
        if original.get(key, expected) != expected:
            problems.append(f"config.json: {key} is {original[key]!r}, LLaVA-1.5 has {expected!r}")
    feature = original.get("mm_vision_select_feature", "patch")
    if feature not in SELECT:
        problems.append(f"config.json: mm_vision_select_feature is {feature!r}, expected {' or '.join(SELECT)}")
    if "unpad" in original.get("mm_patch_merge_type", "") or original.get("image_aspect_ratio") == "anyres":
        problems.append("config.json: images in several tiles (LLaVA-1.6) are not LLaVA-1.5")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(original.get(key), int):
            problems.append(f"config.json: {key} is missing")
    if problems:
        raise UserError(problems)
    image = original["vocab_size"]
    text = {key: original[key] for key in TEXT_FIELDS if original.get(key) is not None}
    rope = {"rope_type": "default", **(original.get("rope_scaling") or {})}
    text |= {
        "model_type": "llama",
        "vocab_size": -(-(image + 2) // ROW_MULTIPLE) * ROW_MULTIPLE,
        "pad_token_id": image + 1,
        "rope_parameters": {"rope_theta": original.get("rope_theta", 10000.0), **rope},
        "tie_word_embeddings": False,
    }
    vision = {**tower.get("vision_config", tower), "model_type": "clip_vision_model"}
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
        "tie_word_embeddings": False,
        "torch_dtype": original.get("dtype", original.get("torch_dtype", "float16")),
        "text_config": text,
        "vision_config": vision,
    }


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of the model a Hugging Face config.json describes, by in-memory name."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def key_problems(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], source: Path) -> list[str]:
    """Every missing and unexpected weight and every wrong shape, by in-memory name."""
    problems = [f"{source}: weight {name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{source}: unexpected weight {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{source}: weight {name} is {list(found[name])}, config.json says {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    return problems


def find_tower(original: Path, named: str) -> Path:
    """Folder of the CLIP model that `mm_vision_tower` names: that folder, `vision_tower/` of the checkpoint, the Hub.

    Raises:
        UserError: none of these.
    """
    for folder in (Path(named), original / TOWER_FOLDER):
        if (folder / "config.json").is_file():
            return folder
    if named.count("/") == 1 and not named.startswith((".", "/")):
        from huggingface_hub import snapshot_download

        small = ["config.json", "preprocessor_config.json"]
        try:
            folder = Path(snapshot_download(named, allow_patterns=[*small, "model*.safetensors"]))
            if not weight_files(folder):
                folder = Path(snapshot_download(named, allow_patterns=[*small, "pytorch_model*.bin*"]))
            return folder
        except Exception as error:  # as in find_base_checkpoint: whatever the reason, it is not to be had
            raise UserError(
                f"{original / 'config.json'}: mm_vision_tower: {named} could not be fetched from the Hub "
                f"({str(error).splitlines()[0]})"
            ) from error
    raise UserError(
        f"{original / 'config.json'}: mm_vision_tower: no such folder: {named}; put the CLIP model's folder into "
        f"{original / TOWER_FOLDER}"
    )


def known_tower(original: Path, named: str) -> dict[str, Any]:
    """config.json of the tower without fetching anything: for an estimate before the model is there."""
    for folder in (Path(named), original / TOWER_FOLDER):
        if (folder / "config.json").is_file():
            return read_config(folder)
    return CLIP_L_336


def converted(source: Path, config: dict[str, Any]) -> Path:
    """Folder in Hugging Face layout of an original checkpoint: made on first use, then found again.

    It lies in `$XDG_CACHE_HOME/llava_sculpt` (default ~/.cache) under a name made of the weights of checkpoint and
    tower. Of several processes one converts and the others wait.

    Raises:
        UserError: as `convert_to_hf`.
    """
    tower = find_tower(source, config["mm_vision_tower"])
    problems = check_shards(source) + check_shards(tower)
    if problems:
        raise UserError(problems)
    name = f"{source.resolve().name}-{_identity(source, tower)[:16]}"
    out = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_sculpt" / name
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f"{name}.lock")):
            if not out.is_dir():
                print(f"{source}: an original LLaVA checkpoint; converting it once into {out}", file=sys.stderr)
                convert_to_hf(source, out)
    return out


def _identity(source: Path, tower: Path) -> str:
    small = [source / "config.json", tower / "config.json"]
    rows = [source / ROWS_FILE] if (source / ROWS_FILE).is_file() else []
    return fingerprint(small, [*weight_files(source), *weight_files(tower), *rows])


def convert_to_hf(source: Path, out: Path) -> None:
    """Write an original checkpoint in Hugging Face layout, one tensor in memory; a killed one continues.

    `<image>` = V and `<pad>` = V + 1 get rows in the embedding and lm_head, filled up to a multiple of 64: those that
    `convert_to_original` has kept beside the weights, else each the mean of the real rows (whose logit never exceeds
    the largest real one). Every other weight keeps its bits.

    Raises:
        UserError: everything that is wrong with the checkpoint, before anything is written; as `write_folder`.
    """
    original = read_config(source)
    if not is_original(original):
        raise UserError(f"{source}: not a checkpoint of the original LLaVA package (no mm_vision_tower in config.json)")
    tower = find_tower(source, original["mm_vision_tower"])
    problems = check_shards(source) + check_shards(tower)
    for folder, name in ((source, "tokenizer.model"), (tower, "preprocessor_config.json")):
        if not (folder / name).is_file():
            problems.append(f"{folder}: {name} is missing")
    if problems:
        raise UserError(problems)
    config = hf_config(original, read_config(tower))
    pieces = LlavaTokenizer.from_dir(source).vocab_size
    if pieces != original["vocab_size"]:
        raise UserError(
            f"{source}: tokenizer.model has {pieces} pieces, config.json vocab_size {original['vocab_size']}"
        )
    own_tower = bool(original.get("unfreeze_mm_vision_tower"))
    rows = original["vocab_size"]
    expected = expected_shapes(config)
    expected |= {name: (rows, *expected[name][1:]) for name in (EMBEDDING, HEAD)}

    # A tower in the checkpoint is a 16-bit copy that the original overwrites, unless it was trained.
    found = [t for t in _renamed(source) if own_tower or not t.name.startswith(TOWER)]
    if not own_tower:
        found += _tower_weights(tower)
    names = [tensor.name for tensor in found]
    problems = [f"{source}: weight {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += key_problems({tensor.name: tensor.shape for tensor in found}, expected, source)
    if problems:
        raise UserError(problems)

    kept = {}
    if (source / ROWS_FILE).is_file():
        kept = {tensor.name: tensor for tensor in stored_tensors(source / ROWS_FILE)}
    full = config["text_config"]["vocab_size"]
    weights = [_with_rows(t, full, kept.get(t.name)) if t.name in (EMBEDDING, HEAD) else t for t in found]
    files = in_shards([Stored(disk_name(t.name), t.shape, t.dtype, t.load) for t in weights])

    def finish(folder: Path) -> None:
        copy_files(source, folder, ["tokenizer.model"])
        copy_files(tower, folder, ["preprocessor_config.json"])
        write_json(folder / "config.json", config)
        complete_processor(folder, config)

    write_folder(out, files, finish, resume={"source": _identity(source, tower), "to": "hf", "files": sorted(files)})


def _renamed(source: Path) -> Iterator[Stored]:
    for file in weight_files(source):
        for tensor in stored_tensors(file):
            if not is_buffer(tensor.name):
                yield Stored(name_of_original(tensor.name), tensor.shape, tensor.dtype, tensor.load)


def _tower_weights(folder: Path) -> Iterator[Stored]:
    """The vision weights of a CLIP folder: a whole CLIPModel, or a CLIPVisionModel by any version of transformers."""
    for file in weight_files(folder):
        for tensor in stored_tensors(file):
            name = tensor.name.removeprefix("vision_model.")
            if name.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")) and not is_buffer(name):
                yield Stored(TOWER + name, tensor.shape, tensor.dtype, tensor.load)


def _with_rows(tensor: Stored, rows: int, kept: Stored | None) -> Stored:
    """The same matrix with rows appended up to `rows`."""
    added = (rows - tensor.shape[0], *tensor.shape[1:])

    def load() -> torch.Tensor:
        weight = tensor.load()
        if kept is not None and kept.shape == added and kept.dtype == tensor.dtype:
            return torch.cat([weight, kept.load()])
        mean = weight.float().mean(dim=0).to(weight.dtype)
        return torch.cat([weight, mean.expand(added)])

    return Stored(tensor.name, (rows, *tensor.shape[1:]), tensor.dtype, load)
