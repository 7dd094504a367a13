"""Small helpers for writing the raw folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """JSON on one line, with a line break at the end; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """A file with these bytes; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
