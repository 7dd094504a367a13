"""What a base checkpoint folder is: found, checked and fingerprinted without loading, fetching or writing anything."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError, first_line
from llava_sculpt.model.base_config import check_llava_config, computation, read_preprocessor
from llava_sculpt.model.expected import weight_problems
from llava_sculpt.model.layout import CLIP_L_336, hf_config, is_original
from llava_sculpt.model.shards import check_shards, files_fingerprint, weight_files, weights_fingerprint
from llava_sculpt.names import shipped
from llava_sculpt.records import file_sha256, read_object

TOWER_FOLDER = "vision_tower"  # inside an original checkpoint that `convert --to original` wrote


@dataclass(frozen=True)
class BaseCheckpoint:
    """A LLaVA-1.5 checkpoint, its configuration in Hugging Face layout.

    Holds config.json, model*.safetensors, tokenizer.model and preprocessor_config.json.

    Attributes:
        path: the local folder.
        config: the parsed config.json.
    """

    path: Path
    config: dict[str, Any]

    @property
    def image_token_id(self) -> int:
        """Id that stands for one image position in `input_ids` (V, one past the SentencePiece vocabulary)."""
        for key in ("image_token_id", "image_token_index"):
            if key in self.config:
                return int(self.config[key])
        raise UserError(f"{self.path / 'config.json'}: image_token_index is missing: not a LLaVA-1.5 checkpoint")

    @property
    def pad_token_id(self) -> int:
        """Id of padding (V + 1)."""
        value = self.config.get("pad_token_id", self.config.get("text_config", {}).get("pad_token_id"))
        return self.image_token_id + 1 if value is None else int(value)

    @property
    def image_tokens(self) -> int:
        """Tokens one image becomes: (image size / patch size) squared, and the class token where it is selected."""
        patches = (self.image_size // int(self.config["vision_config"]["patch_size"])) ** 2
        return patches + (self.config.get("vision_feature_select_strategy") == "full")

    @property
    def image_size(self) -> int:
        """Side of the square images the tower takes, in pixels."""
        return int(self.config["vision_config"]["image_size"])

    @property
    def input_widths(self) -> list[int]:
        """In features of the LLM's linear layers.

        Fields absent from config.json have the defaults of the architecture (Llama-7B).
        """
        text = self.config.get("text_config", {})
        hidden, heads = int(text.get("hidden_size", 4096)), int(text.get("num_attention_heads", 32))
        attention = heads * int(text.get("head_dim") or hidden // heads)
        return [hidden, attention, int(text.get("intermediate_size", 11008))]

    @property
    def smallest_dimension(self) -> int:
        """Smallest side of any matrix that gets LoRA, the connector's included: an upper bound for the rank."""
        text, vision = self.config.get("text_config", {}), self.config.get("vision_config", {})
        heads = int(text.get("num_attention_heads", 32))
        key_value = self.input_widths[1] // heads * int(text.get("num_key_value_heads") or heads)
        return min(*self.input_widths, key_value, int(vision.get("hidden_size", 1024)))

    def fingerprint(self) -> str:
        """sha256 over config.json and a sample of every weight file: equal for copies, different for other weights.

        Reads the header and 64 evenly spaced blocks of each file, so that a 14 GB model takes milliseconds. Results
        and run folders are recorded with it. Files of the same weights that are cut or named otherwise have another
        one: what decides whether an adapter fits a base then is `weights_fingerprint`, recorded beside it since 0.2.
        """
        return files_fingerprint([self.path / "config.json"], weight_files(self.path))

    def architecture(self) -> str:
        """sha256 over what is computed with the weights: by config.json, preprocessor_config.json and tokenizer.model.

        The same in every layout. With `weights_fingerprint` it says that two bases give the same answers.
        """
        pixels = read_preprocessor(self.path / "preprocessor_config.json", self.image_size)
        parts = [*computation(self.config), pixels, file_sha256(self.path / "tokenizer.model")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def weights_fingerprint(self) -> str:
        """sha256 over the weights alone, the same in every layout; see `shards.weights_fingerprint`."""
        is_llava = self.config.get("model_type") == "llava"
        return weights_fingerprint(self.path, self.image_token_id if is_llava else None)


def find_base_checkpoint(name_or_path: str, weights: bool = True) -> BaseCheckpoint:
    """A local folder, or a Hub id in the local cache, and whether it has what is needed.

    Args:
        weights: False is content with configuration and tokenizer, also those of the original LLaVA package (`config`
            is then what converting gives). Weights in that layout are for `artifacts.open.open_checkpoint` to convert.

    Raises:
        UserError: nothing there, or every missing or damaged file of the folder.
    """
    path = find_folder(name_or_path)
    config, problems, needed = read_config(path), [], ["tokenizer.model", "preprocessor_config.json"]
    if is_original(config):
        if weights:
            raise UserError(
                f"{path}: a checkpoint of the original LLaVA package; convert it: llava-sculpt convert checkpoint "
                f"{name_or_path} --to hf --out FOLDER"
            )
        config, needed = hf_config(config, known_tower(path, config["mm_vision_tower"])), needed[:1]
    elif config.get("model_type") != "llava":
        problems.append(
            f"{path / 'config.json'}: model_type is {config.get('model_type')!r}, expected a LLaVA-1.5 checkpoint, "
            "such as llava-hf/llava-1.5-7b-hf or liuhaotian/llava-v1.5-7b"
        )
    problems += [f"{path}: {name} is missing" for name in needed if not (path / name).is_file()]
    problems += check_shards(path) if weights else []
    if problems:
        raise UserError(problems)
    check_llava_config(config, path / "config.json")
    if "preprocessor_config.json" in needed:
        read_preprocessor(path / "preprocessor_config.json", config["vision_config"]["image_size"])
    problems = weight_problems(path, config) if weights else []
    pieces, image = LlavaTokenizer.from_dir(path).vocab_size, BaseCheckpoint(path, config).image_token_id
    if image < pieces:
        problems.append(f"{path}: tokenizer.model has {pieces} pieces, config.json puts the image token at {image}")
    if problems:
        raise UserError(problems)
    return BaseCheckpoint(path, config)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: missing or not a JSON object.
    """
    return read_object(folder / "config.json", f"{folder}: no config.json: not a model folder")


def known_tower(original: Path, named: str) -> dict[str, Any]:
    """config.json of the tower without fetching anything: for an estimate before the model is there."""
    for folder in (Path(named), original / TOWER_FOLDER):
        if os.path.isfile(folder / "config.json"):
            return read_config(folder)
    return CLIP_L_336


def find_folder(name_or_path: str, fetch: list[str] | None = None) -> Path:
    """A local folder, the package's own tiny checkpoint, or the folder of a Hub id in the local cache.

    Args:
        fetch: patterns of the files that are fetched from the Hub, if the cache lacks them; none: nothing is.

    Raises:
        UserError: neither.
    """
    if os.path.isdir(place := shipped(name_or_path)):
        return Path(place)
    if os.path.isabs(name_or_path) or name_or_path.startswith(".") or name_or_path.count("/") != 1:
        raise UserError(f"no such folder: {name_or_path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=fetch, local_files_only=not fetch))
    # The hub client raises its own, requests' and OS errors: whatever it is, the model is not to be had.
    except Exception as error:
        how = "that could be fetched from the Hub" if fetch else f"in the local cache (hf download {name_or_path})"
        raise UserError(f"{name_or_path}: neither a folder nor a model {how}: {first_line(error)}") from error
