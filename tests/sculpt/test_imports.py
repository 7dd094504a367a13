"""The method stays a small room of its own: torch (with its Triton), the standard library, and itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import llava_sculpt.sculpt


def test_imports_only_torch_and_itself():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in Path(llava_sculpt.sculpt.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed or name.startswith("llava_sculpt.sculpt"), (path, name)
