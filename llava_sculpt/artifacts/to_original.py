"""A checkpoint in Hugging Face layout written as the original LLaVA package reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sculpt.artifacts.from_original import ROWS_FILE
from llava_sculpt.artifacts.writing import copy_files, in_shards, write_folder
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.model.checkpoint import TOWER_FOLDER, BaseCheckpoint
from llava_sculpt.model.layout import EMBEDDING, HEAD, SELECT, TEXT_FIELDS, TOWER, is_buffer, is_tied, original_name
from llava_sculpt.model.shards import Stored, model_tensors
from llava_sculpt.records import write_json


def convert_to_original(checkpoint: BaseCheckpoint, out: Path) -> None:
    """Write a checkpoint for the original package, one tensor in memory at a time; a killed conversion continues.

    The vision tower goes into `out/vision_tower` as a CLIPVisionModel of its own, and `mm_vision_tower` names that
    folder by its absolute path, the only kind of local path the original accepts. The rows behind the vocabulary
    (`<image>`, `<pad>`, filling) are dropped and kept in a file beside the weights that the original does not read, so
    that the way back gives the same bits.

    Raises:
        UserError: a vocabulary that is not LLaVA-1.5's, before anything is written; as `write_folder`.
    """
    rows = checkpoint.image_token_id
    left_out = (HEAD,) if is_tied(checkpoint.config) else ()
    found = [t for t in model_tensors(checkpoint.path) if not is_buffer(t.name) and t.name not in left_out]
    pieces = LlavaTokenizer.from_dir(checkpoint.path).vocab_size
    if rows != pieces:
        raise UserError(
            f"{checkpoint.path}: the image token is {rows} and tokenizer.model has {pieces} pieces; LLaVA-1.5 has the "
            "image token right behind them"
        )
    matrices = [t for t in found if t.name in (EMBEDDING, HEAD)]
    language = [_rows(t, 0, rows) if t in matrices else t for t in found if not t.name.startswith(TOWER)]
    files = in_shards([Stored(original_name(t.name), t.shape, t.dtype, t.load) for t in language])
    files[f"{TOWER_FOLDER}/model.safetensors"] = [
        Stored(f"vision_model.{t.name.removeprefix(TOWER)}", t.shape, t.dtype, t.load)
        for t in found
        if t.name.startswith(TOWER)
    ]
    files[ROWS_FILE] = [_rows(t, rows, t.shape[0]) for t in matrices]
    target = out.resolve() / TOWER_FOLDER

    def finish(folder: Path) -> None:
        copy_files(checkpoint.path, folder, ["tokenizer.model"])
        copy_files(checkpoint.path, folder / TOWER_FOLDER, ["preprocessor_config.json"])
        write_json(folder / "config.json", original_config(checkpoint, str(target)))
        write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
        tower_config = {**checkpoint.config["vision_config"], "model_type": "clip_vision_model"}
        write_json(folder / TOWER_FOLDER / "config.json", {**tower_config, "architectures": ["CLIPVisionModel"]})

    job = {"source": checkpoint.fingerprint(), "to": "original", "files": sorted(files)}
    write_folder(out, files, finish, resume=job)


def _rows(tensor: Stored, first: int, last: int) -> Stored:
    shape = (last - first, *tensor.shape[1:])
    return Stored(tensor.name, shape, tensor.dtype, lambda: tensor.load()[first:last].clone())


SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2048,
    "padding_side": "right",
    **SPECIAL_TOKENS,
}


def original_config(checkpoint: BaseCheckpoint, tower: str) -> dict[str, Any]:
    """config.json as the original package writes it; `tower`: what `mm_vision_tower` shall name."""
    from transformers import LlavaConfig

    config: Any = LlavaConfig.from_dict(checkpoint.config)  # fills in what the file leaves to the architecture
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    rope = dict(text.get("rope_parameters") or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    select = {ours: theirs for theirs, ours in SELECT.items()}
    dtype = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype", "float16"))
    return {
        **{key: text[key] for key in TEXT_FIELDS if text.get(key) is not None and key not in ("head_dim", "mlp_bias")},
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": checkpoint.image_token_id,
        "pad_token_id": 0,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {**rope, "type": kind},
        "tie_word_embeddings": is_tied(checkpoint.config),
        "torch_dtype": dtype,
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": select[config.vision_feature_select_strategy],
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": tower,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
    }
