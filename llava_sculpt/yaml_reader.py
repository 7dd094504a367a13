"""YAML as settings are written in it: one mapping, every key once, nothing that means more than it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llava_sculpt.errors import UserError
from llava_sculpt.records import read_text

_MOST_BYTES = 200_000
_DEEPEST = 20
_MOST_VALUES = 20_000  # with everything that aliases repeat


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Its keys are text, at every level.

    Read as YAML 1.2 reads numbers: 1e-3 is one, 010 is ten, and neither 1:30 nor 2026-01-02 is one. Aliases may stand
    for what was written before them; tags and merge keys are not known.

    Raises:
        UserError: the file as in `read_text`; not YAML, a key given twice, nested too deeply, or larger than any
            settings, written or with its aliases put in.
    """
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path}: larger than any settings are ({_MOST_BYTES:,} bytes)")
    text = read_text(path)
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {_short(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected `key: value` at the top level")
    return value


def _short(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + " ".join(str(getattr(error, "problem", None) or error).split())


class _Loader(yaml.SafeLoader):
    """PyYAML's for plain values, with limits that hold before anything is built."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _wrong(f"the tag {event.tag} is not known here", event)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _wrong("nested too deeply", event)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _wrong("an alias inside what it stands for", event)
            return node
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts if isinstance(part, yaml.Node))
        if self._sizes[id(node)] > _MOST_VALUES:
            raise _wrong(f"more than {_MOST_VALUES:,} values with the aliases put in", node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != self.DEFAULT_SCALAR_TAG:
                raise _wrong("a key must be text", key)
            if key.value in seen:
                raise _wrong(f"the key {key.value} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _wrong(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.yaml_implicit_resolvers = {}  # PyYAML's are those of YAML 1.1
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
