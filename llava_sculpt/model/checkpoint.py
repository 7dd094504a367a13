"""What a base checkpoint folder is: found, checked and fingerprinted without loading its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.model.from_original import converted, is_original
from llava_sculpt.model.shards import check_shards, fingerprint, read_config, weight_files


@dataclass(frozen=True)
class BaseCheckpoint:
    """A LLaVA-1.5 checkpoint in Hugging Face layout (an original one has been converted to it).

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
        """Tokens one image becomes: (image size / patch size) squared."""
        return (self.image_size // int(self.config["vision_config"]["patch_size"])) ** 2

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

        Reads the header and 64 evenly spaced blocks of each file, so that a 14 GB model takes milliseconds.
        """
        return fingerprint([self.path / "config.json"], weight_files(self.path))


def find_base_checkpoint(name_or_path: str, weights: bool = True) -> BaseCheckpoint:
    """Resolve a local folder, or a Hub id already in or fetched into the local cache, and check what is needed.

    A checkpoint of the original LLaVA package is converted once, into this user's cache. Without `weights` one in
    Hugging Face layout needs configuration and tokenizer only.

    Raises:
        UserError: nothing there, or every missing or damaged file of the folder.
    """
    path = find_folder(name_or_path, weights)
    config = read_config(path)
    if is_original(config):
        path = converted(path, config)
        config = read_config(path)
    problems = []
    if config.get("model_type") != "llava":
        problems.append(
            f"{path / 'config.json'}: model_type is {config.get('model_type')!r}, expected a LLaVA-1.5 checkpoint, "
            "such as llava-hf/llava-1.5-7b-hf or liuhaotian/llava-v1.5-7b"
        )
    for name in ("tokenizer.model", "preprocessor_config.json"):
        if not (path / name).is_file():
            problems.append(f"{path}: {name} is missing")
    problems += check_shards(path) if weights else []
    if problems:
        raise UserError(problems)
    return BaseCheckpoint(path, config)


def find_folder(name_or_path: str, weights: bool = True) -> Path:
    """A local folder, or that of a Hub id in the local cache, fetched if need be; nothing in it is checked.

    Without `weights` those of a Hugging Face checkpoint are not fetched.

    Raises:
        UserError: neither.
    """
    path = Path(name_or_path)
    return path if path.is_dir() else _from_hub(name_or_path, weights)


def _from_hub(name: str, weights: bool) -> Path:
    if os.path.isabs(name) or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"{name}: no such folder (an adapter's base can be given with --base)")
    from huggingface_hub import snapshot_download

    # The small files first: config.json says which kind of weights to ask for.
    small = ["*.json", "*.jinja", "tokenizer.model"]
    try:
        path = Path(snapshot_download(name, allow_patterns=small))
        original = is_original(read_config(path))
        if not (weights or original):
            return path
        wanted = ["*.safetensors", "pytorch_model*.bin"] if original else ["*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=[*small, *wanted]))
    except UserError:
        raise
    # The hub client raises its own, requests' and OS errors: whatever it is, the model is not to be had.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: neither a folder nor a model that could be fetched from the Hub ({reason}); "
            "an adapter's base can be given with --base"
        ) from error
