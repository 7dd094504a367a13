"""Official downloads of the six data sets -> training JSON, question files and gold answers.

A data set is one module NAME.py here and one row in `llava_sculpt.names.TASKS`. Its `prepare(job, *, OPTION=DEFAULT)`
takes a `Preparation`; its keyword-only parameters, annotated with their help text, become flags of
`llava-sculpt prepare NAME`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from llava_sculpt.errors import UserError
from llava_sculpt.names import TASKS
from llava_sculpt.tasks.common import Record
from llava_sculpt.tasks.preparation import Preparation


class Option(NamedTuple):
    """An option of a preparation: its type (of a value that is not None), default, choices (if any) and help text."""

    kind: type
    default: Any
    choices: tuple[str, ...] | None
    help: str


def prepare_benchmark(name: str, raw: Path, out: Path, **options: Any) -> Record:
    """Prepare data set `name` from the official files in `raw` into `out`; returns the manifest.

    `options` are those of `prepare_options`. Raises UserError for an unknown name, option or choice, a missing
    folder, and everything wrong in the raw files (each record named).
    """
    known = prepare_options(name)
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise UserError(f"{name}: unknown option {', '.join(unknown)}; it has {', '.join(known)}")
    for key, value in options.items():
        choices = known[key].choices
        if choices and value not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
    if not raw.is_dir():
        raise UserError(f"{raw}: folder not found (--raw should be the folder with {name}'s official files)")
    prepare = _preparation(name)
    own = {key: options.pop(key, option.default) for key, option in _options(prepare).items()}
    return prepare(Preparation(name, raw, out, own, **options), **own)


def prepare_options(name: str) -> dict[str, Option]:
    """The options of data set `name`: those that all have, then its own."""
    return _options(Preparation) | _options(_preparation(name))


def _options(callable: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters, each annotated as Annotated[type, help text]."""
    hints = get_type_hints(callable, include_extras=True)
    found = {}
    for parameter in inspect.signature(callable).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            annotation, text = get_args(hints[parameter.name])
            choices = get_args(annotation) if get_origin(annotation) is Literal else None
            kind = str if choices else next(iter(get_args(annotation)), annotation)  # Path of Path | None
            found[parameter.name] = Option(kind, parameter.default, choices, text)
    return found


def _preparation(name: str) -> Callable[..., Record]:
    if name not in TASKS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(TASKS)}")
    prepare: Callable[..., Record] = import_module(f"{__name__}.{name}").prepare
    return prepare
