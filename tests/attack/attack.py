"""Inputs made wrong at random, and what a command makes of them: one message with exit code 2, or the right result."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llava_sculpt.errors import UserError

HANGS_AFTER = 60  # seconds
_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7.5, 1e308, -1e308, float("nan"), float("inf"), 10**30, 2**63),
    *("", " ", "x", "0", "null", "../..", "\ud800", "é" * 300, "a" * 5000, "(a+)+$"),
    *([], {}, [None], [[]], {"": None}, [1, 2], "[]"),
]


@dataclass
class Outcome:
    """Exit code of a command, and the lines it wrote to stderr (or the problems of a UserError)."""

    code: int
    lines: list[str]


def outcome(call: Callable[[], Any], capture: pytest.CaptureFixture[str] | None = None) -> Outcome:
    """What a call comes to: a command's `main`, or a function (done is code 0, a UserError code 2).

    Fails, with the traceback, at every other exception, and when it takes longer than `HANGS_AFTER`.
    """
    if capture is not None:
        capture.readouterr()
    try:
        with _in_time():
            code = call()
    except UserError as error:
        return Outcome(2, error.problems)
    except SystemExit as error:
        code = error.code
    lines = capture.readouterr().err.splitlines() if capture is not None else []
    assert code != 2 or capture is None or any("error: " in line for line in lines), lines
    return Outcome(code if isinstance(code, int) else 0, lines)


@contextmanager
def _in_time() -> Iterator[None]:
    def hangs(number: int, frame: Any) -> None:
        raise AssertionError(f"hangs: not done after {HANGS_AFTER} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A copy of a JSON value with one thing changed somewhere in it, and a description of the change."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or rng.random() < 0.05:
        odd = rng.choice(_ODD)
        return odd, f"all of it is {odd!r:.40}"
    holder, key, path = rng.choice(places)
    what = rng.randrange(6)
    if what == 0:
        del holder[key]
        return value, f"{path} deleted"
    if what == 1 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = rng.choice([-holder[key], holder[key] * 1000, holder[key] + 1, str(holder[key]), [holder[key]]])
    elif what == 2:
        holder[key] = [copy.deepcopy(holder[key])]
    else:
        holder[key] = copy.deepcopy(rng.choice(_ODD))
    return value, f"{path} is {holder[key]!r:.40}"


def _places(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key, f"{path}.{key}"
        yield from _places(item, f"{path}.{key}")


def mutate_json_file(rng: random.Random, file: Path) -> str:
    """Change one thing in a JSON file; what it was."""
    value, change = mutated(rng, json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(value), encoding="utf-8")
    return f"{file.name}: {change}"


def break_file(rng: random.Random, file: Path) -> str:
    """Damage a file in one of the ways that disks, copies and people do; what it was."""
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content)) if content else 0
    kind = rng.choice(
        ["flip", "cut", "empty", "zeros", "noise", "folder", "pipe", "missing", "loop", "encoding", "deep"]
    )
    file.unlink()
    if kind == "flip" and content:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "empty":
        content.clear()
    elif kind == "zeros":
        content[place:] = bytes(len(content) - place)
    elif kind == "noise":
        content[:] = rng.randbytes(min(len(content), 4096))
    elif kind == "encoding":
        content[place:place] = b"\xff\xfe\x00"
    elif kind == "deep":
        content[:] = b"[" * 200_000
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind != "missing":
        file.write_bytes(content)
    return f"{file.name}: {kind}"


def fresh_copy(source: Path, target: Path) -> Path:
    """`source` copied to `target`, in place of what an earlier try has left there."""
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    return target
