"""Writing the raw files of the tiny world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def put(path: Path, content: Any) -> None:
    """Write bytes as they are and anything else as JSON on one line; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else (json.dumps(content) + "\n").encode())
