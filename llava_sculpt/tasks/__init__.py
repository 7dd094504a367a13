"""Official downloads of the six data sets -> training JSON, question files and gold answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.tasks import coco, gqa, iconqa, ocrvqa, okvqa, textvqa
from llava_sculpt.tasks.common import Record

TARGETS = ("iconqa", "coco")
SOURCES = ("okvqa", "ocrvqa", "gqa", "textvqa")
_PREPARE: dict[str, Callable[..., Record]] = {
    "iconqa": iconqa.prepare,
    "coco": coco.prepare,
    "okvqa": okvqa.prepare,
    "ocrvqa": ocrvqa.prepare,
    "gqa": gqa.prepare,
    "textvqa": textvqa.prepare,
}


def prepare_benchmark(name: str, raw: Path, out: Path, **options: Any) -> Record:
    """Prepare data set `name` from the official files in `raw` into `out`; returns the manifest.

    `options` are the keyword arguments of that data set's `prepare` (see `prepare_options`). Raises UserError
    for an unknown name or option, a missing folder, and everything wrong in the raw files.
    """
    known = prepare_options(name)
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise UserError(f"{name}: unknown option {', '.join(unknown)}; it has {', '.join(known)}")
    if not raw.is_dir():
        raise UserError(f"{raw}: folder not found (--raw should be the folder with {name}'s official files)")
    return _PREPARE[name](raw, out, **options)


def prepare_options(name: str) -> dict[str, Any]:
    """The option names of a data set's `prepare` with their defaults."""
    if name not in _PREPARE:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(_PREPARE)}")
    parameters = inspect.signature(_PREPARE[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
