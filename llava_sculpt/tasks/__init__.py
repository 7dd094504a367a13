"""Official downloads of the six data sets -> training JSON, question files and gold answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.names import TASKS
from llava_sculpt.tasks.common import Record


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
    return _preparation(name)(raw, out, **options)


def prepare_options(name: str) -> dict[str, Any]:
    """The option names of a data set's `prepare` with their defaults."""
    parameters = inspect.signature(_preparation(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _preparation(name: str) -> Callable[..., Record]:
    if name not in TASKS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(TASKS)}")
    prepare: Callable[..., Record] = import_module(f"{__name__}.{name}").prepare
    return prepare
