"""Files named in documents, configurations, scripts and docstrings exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = re.compile(
    r"(?<![\w/.*{}$<>@:-])((?:\.\./)*[\w.-]+(?:/[\w.-]+)+\.(?:py|yaml|json|md|sh|html|png|svg))(?![\w*{])"
)
OF_LLAVA = {"scripts/v1_5/finetune_task_lora.sh"}


def test_every_file_that_is_named_exists() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # Paths into data/ and runs/ are those of files that users make; NAME.py stands for any name.
    rooms = {part for name in listed for part in Path(name).parts[:2]} - {"data"}
    missing = []
    for name in listed:
        if name.endswith((".md", ".yaml", ".sh", ".py", "Makefile")) and not name.startswith(("tests/", "results/")):
            file = ROOT / name
            for path in sorted(set(PATH.findall(file.read_text(encoding="utf-8"))) - OF_LLAVA):
                ours = path.startswith("..") or (path.split("/")[0] in rooms and not re.search(r"[A-Z]{4}", path))
                if ours and not any((place / path).exists() for place in (ROOT, file.parent, ROOT / "llava_sculpt")):
                    missing.append(f"{name}: {path}")
    assert not missing
