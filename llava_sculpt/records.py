"""Files that are never seen half written, JSON that names its errors and is checked, hashes and versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import llava_sculpt
from llava_sculpt.errors import UserError

T = TypeVar("T")
WRITING = ".writing"  # ends the name of every file that is not whole yet
_PACKAGES = (
    "torch transformers peft accelerate safetensors sentencepiece pillow deepspeed bitsandbytes pycocoevalcap".split()
)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` to write into; renamed to `path` at the end, deleted after an error.

    So `path` is never half written, and no link that waits under the other name is followed. What a kill leaves is
    found by `locks.remove_leftovers`.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=WRITING)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        # mkstemp makes private files; a record should be as readable as any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so that `path` is never half written."""
    with written_aside(path) as stream:
        stream.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, atomically; what JSON does not know becomes a string."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode())


def check_regular(path: Path) -> None:
    """Refuse what can be opened but is no file with an end: a pipe would be waited for, a device read for ever.

    Raises:
        UserError: a folder, pipe, device or socket. (A missing file is left to who opens it.)
    """
    with suppress(OSError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or device'}, not a file")


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. UserError naming the file if it is missing, no regular file, or cannot be read."""
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: file not found") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """The JSON value in `text`, which is all of the file at `path` or its line `line`. UserError that says where."""
    source = f"{path}: line {line}" if line else str(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if line else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{source}: not valid JSON ({place}: {error.msg})") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{source}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{source}: not valid JSON (nested too deeply)") from error


def read_json(path: Path) -> Any:
    """The JSON value in a file. UserError naming the file, and the place in it, if it is missing or not valid."""
    return parse_json(read_text(path), path)


def read_object(path: Path, missing: str | None = None) -> dict[str, Any]:
    """The JSON object in a file. UserError as `read_json`, or `missing` if there is no file, or for another value."""
    if missing is not None and not path.is_file():
        raise UserError(missing)
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, found {type(value).__name__}")
    return value


def checked(value: Any, kind: type[T], source: str | Path) -> T:
    """`value` itself, which must be what `kind` says: a TypedDict, or any other type that pydantic knows.

    Types are taken strictly (1 is a float, "1" and True are not); keys that a TypedDict does not name may be there.

    Raises:
        UserError: every field that is missing or wrong, behind the name of the source.
    """
    from pydantic import ValidationError

    try:
        adapter: Any = _adapter(kind)  # type: ignore[arg-type]  # a class is hashable
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        problems = {
            ": ".join([str(source), *filter(None, [".".join(map(str, found["loc"]))]), _problem(found)]): None
            for found in error.errors(include_url=False)
        }
        raise UserError(problems) from error
    checked_value: T = value
    return checked_value


@lru_cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _problem(found: Any) -> str:
    if found["type"] == "missing":
        return "is missing"
    shown = repr(found["input"])
    message = found["msg"][:1].lower() + found["msg"][1:]
    return f"{message}, found {shown if len(shown) < 60 else shown[:57] + '...'}"


def read_checked(path: Path, kind: type[T], missing: str | None = None) -> T:
    """The JSON object in a file, as `checked`.

    Raises:
        UserError: as `read_object` and `checked`.
    """
    return checked(read_object(path, missing), kind, path)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what results depend on (installed packages only), and the git commit of a checkout."""
    found = {"llava_sculpt": llava_sculpt.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--show-prefix", "HEAD"]
    done = subprocess.run(ask, capture_output=True, text=True, check=False)
    prefix, _, commit = done.stdout.partition("\n")
    if done.returncode == 0 and prefix == "llava_sculpt/":  # no other repository, such as one that has .venv in it
        found["git_commit"] = commit.strip()
    return found
