"""What edits have in common: baselines that change a trained adapter, each in `artifacts/NAME.py` as a function NAME.

    NAME(adapter: Path, out: Path, *, settings...)

writes the new folder `out`, an adapter or a merged model, in one rename, with edit.json: what was done to which
adapter, and the training's run.json. Its settings are keywords: fields of the method's row in names.py, which says
what numbers they take (`check_settings`), and any of `seed`, `base` (checkpoint in place of the one that the adapter
names), `data_path` and `image_folder` (the training set). `Annotated[type, help]` and the default of each make the flag
of `llava-sculpt edit NAME`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from llava_sculpt.errors import UserError
from llava_sculpt.model.files import ADAPTER_FILE
from llava_sculpt.model.whole import read_run
from llava_sculpt.names import METHODS
from llava_sculpt.ranges import out_of_range
from llava_sculpt.records import file_sha256, versions, write_json

EDIT_FILE = "edit.json"
Base = Annotated[str | None, "base checkpoint, if not the one the adapter names"]


def find_edit(name: str) -> Callable[..., Any]:
    """The function NAME of `artifacts/NAME.py`."""
    return getattr(importlib.import_module(f"llava_sculpt.artifacts.{name}"), name)


def settings_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `given` that are settings of an edit."""
    own = inspect.signature(find_edit(name)).parameters.values()
    return {p.name: given[p.name] for p in own if p.kind is p.KEYWORD_ONLY and p.name in given}


def add_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """A flag for each setting of an edit."""
    edit = find_edit(name)
    hints = get_type_hints(edit, include_extras=True)
    for key, parameter in inspect.signature(edit).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        kind, text = get_args(hints[key])
        if kind is bool:
            parser.add_argument(f"--{key}", action="store_true", help=text)
        elif parameter.default is parameter.empty:
            parser.add_argument(f"--{key}", type=kind, required=True, help=text)
        elif parameter.default is None:
            parser.add_argument(f"--{key}", help=text)
        else:
            parser.add_argument(
                f"--{key}", type=kind, default=parameter.default, help=f"{text} (default {parameter.default})"
            )


def check_settings(name: str, **settings: Any) -> None:
    """Check settings of an edit against its row in names.py.

    Raises:
        UserError: what is out of range, all at once.
    """
    fields = METHODS[name].fields
    wrong = {key: out_of_range(value, *fields[key]) for key, value in settings.items()}
    if any(wrong.values()):
        raise UserError(f"{key}: {problem}" for key, problem in wrong.items() if problem)


def write_record(folder: Path, adapter: Path, method: str, settings: dict[str, Any], **more: Any) -> None:
    """Write edit.json into the folder of a result."""
    record = {
        "method": method,
        "settings": settings,
        "adapter": {"path": str(adapter), "sha256": file_sha256(adapter / ADAPTER_FILE)},
        "run": read_run(adapter),
        "versions": versions(),
        **more,
    }
    write_json(folder / EDIT_FILE, record)
