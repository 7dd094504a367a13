"""What turns text and images into a model's inputs, as one hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llava_sculpt.records import file_sha256

# transformers prefers processor_config.json, where there is one, to preprocessor_config.json.
_FILES = ("tokenizer.model", "preprocessor_config.json", "processor_config.json")


def processing_fingerprint(checkpoint: Path) -> str:
    """sha256 over the files of a checkpoint folder that tokenizer and image preprocessing are made from."""
    lines = [f"{name} {file_sha256(checkpoint / name)}\n" for name in _FILES if (checkpoint / name).is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
