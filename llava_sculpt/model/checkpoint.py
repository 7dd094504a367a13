"""What a base checkpoint folder is: found, checked and fingerprinted without loading its weights."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llava_sculpt.errors import UserError

# What a model folder holds beside its weights and config.json, as far as transformers, vLLM or the original read it.
SIDE_FILES = (
    "generation_config.json preprocessor_config.json processor_config.json chat_template.json chat_template.jinja "
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json"
).split()
_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class BaseCheckpoint:
    """A LLaVA-1.5 checkpoint in Hugging Face layout.

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
    def smallest_dimension(self) -> int:
        """Smallest side of any matrix that gets LoRA: an upper bound for the rank.

        Fields absent from config.json have the defaults of the architecture (Llama-7B, CLIP ViT-L).
        """
        text, vision = self.config.get("text_config", {}), self.config.get("vision_config", {})
        hidden = int(text.get("hidden_size", 4096))
        heads = int(text.get("num_attention_heads", 32))
        key_value = int(text.get("num_key_value_heads") or heads) * int(text.get("head_dim") or hidden // heads)
        return min(hidden, key_value, int(text.get("intermediate_size", 11008)), int(vision.get("hidden_size", 1024)))

    def fingerprint(self) -> str:
        """sha256 over config.json and a sample of every weight file: equal for copies, different for other weights.

        Reads the header and 64 evenly spaced blocks of each file, so that a 14 GB model takes milliseconds.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in weight_files(self.path):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as stream:
                for index in range(_SAMPLED_BLOCKS):
                    stream.seek(max(0, size - _BLOCK_BYTES) * index // (_SAMPLED_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK_BYTES))
        return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The model weight files of a checkpoint folder, sorted by name."""
    return sorted(folder.glob("model*.safetensors"))


def check_safetensors(file: Path) -> None:
    """Open a safetensors file far enough to know that its header matches its size.

    Raises:
        UserError: truncated or not a safetensors file.
    """
    try:
        with safe_open(str(file), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error}); copy or download it again") from error


def find_base_checkpoint(name_or_path: str) -> BaseCheckpoint:
    """Resolve a local folder, or a Hub id already in or fetched into the local cache, and check what is needed.

    Raises:
        UserError: nothing there, or every missing or damaged file of the folder.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        path = _from_hub(name_or_path)
    problems = []
    config: dict[str, Any] = {}
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path}: no config.json: not a model folder")
    except (OSError, ValueError) as error:
        problems.append(f"{path / 'config.json'}: not readable as JSON: {error}")
    if config and config.get("model_type") != "llava":
        problems.append(
            f"{path / 'config.json'}: model_type is {config.get('model_type')!r}, expected 'llava' "
            "(a LLaVA-1.5 checkpoint in Hugging Face layout, such as llava-hf/llava-1.5-7b-hf)"
        )
    for name in ("tokenizer.model", "preprocessor_config.json"):
        if not (path / name).is_file():
            problems.append(f"{path}: {name} is missing")
    files = weight_files(path)
    if not files:
        problems.append(f"{path}: no model*.safetensors weights")
    for file in files:
        try:
            check_safetensors(file)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return BaseCheckpoint(path, config)


def _from_hub(name: str) -> Path:
    if os.path.isabs(name) or name.startswith(".") or name.count("/") != 1:
        raise UserError(f"model_name_or_path: no such folder: {name}")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model", "*.safetensors*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    # The hub client raises its own, requests' and OS errors: whatever it is, the model is not to be had.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model_name_or_path: {name} is neither a folder nor a model that could be fetched from the Hub ({reason})"
        ) from error
