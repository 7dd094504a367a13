"""Large official JSON files record by record: memory for one record, not for the file.

Not ijson: its errors do not name line and column, it is quick only where its C backend is (and then takes 1.4 times
as long as json's scanner, record by record).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.progress import ProgressBar

_CHUNK = 1 << 20  # characters
_LARGEST_RECORD = 64 << 20  # a record that does not end within as many characters is taken for broken
_PROGRESS_FROM = 64 << 20  # bytes; a smaller file is read before a bar could be seen
_SPACE = " \t\n\r"


def stream_records(path: Path, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """The records of a JSON file as (name, record), one at a time.

    Without `key` the file holds one object, whose members are the records, named by their keys (OCR-VQA, GQA).
    With `key` the records are the items of the list under that key of the object, named by position from 0
    (COCO). A bar shows the progress of a file above 64 MB. Raises UserError, also after some records were
    yielded: the file cannot be read, is not valid JSON (with line and column), does not have that form, or holds no
    records.
    """
    size = path.stat().st_size if path.is_file() else 0
    bar = ProgressBar(path.name, size / 1e6, unit=" MB", shown=size >= _PROGRESS_FROM)
    try:
        with path.open(encoding="utf-8-sig") as stream, bar:
            found = 0
            for name, record in _Reader(stream, path, bar).records(key):
                found += 1
                yield name, record
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not found:
        raise UserError(f"{path}: holds no records" + (f" under the key {key!r}" if key else ""))


class _Reader:
    """A window over the text of a file, and a position in it."""

    def __init__(self, stream: Any, path: Path, bar: ProgressBar) -> None:
        self._stream, self._path, self._bar = stream, path, bar
        self._read = 0  # bytes
        self._text, self._at = "", 0
        self._line, self._column = 1, 1  # of the beginning of the window
        self._decoder = json.JSONDecoder()

    def records(self, key: str | None) -> Iterator[tuple[str, Any]]:
        kind = self._next()
        if kind != "{":
            self._value()  # report invalid JSON first
            raise UserError(f"{self._path}: should hold a JSON object")
        seen = False
        for name in self._members():
            if key is None:
                yield name, self._value()
            elif name != key:
                self._value()
            elif self._next() != "[":
                raise UserError(f"{self._path}: no list of records under the key {key!r}")
            else:
                seen = True
                for position, _ in enumerate(self._items("[", "]")):
                    yield str(position), self._value()
        if self._next():
            self._fail("text behind the end")
        if key is not None and not seen:
            raise UserError(f"{self._path}: no list of records under the key {key!r}")

    def _members(self) -> Iterator[str]:
        for _ in self._items("{", "}"):
            if self._next() != '"':
                self._fail("expected a name in double quotes")
            name = self._value()
            self._take(":")
            yield name

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Once for each item of an object or a list; the caller reads the item."""
        self._take(opening)
        if self._next() == closing:
            self._take(closing)
            return
        while True:
            yield
            if self._next() == closing:
                self._take(closing)
                return
            self._take(",")

    def _next(self) -> str:
        """The next character that is no white space, which is not taken; "" at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _take(self, sign: str) -> None:
        if self._next() != sign:
            self._fail(f"expected {sign!r}")
        self._at += 1

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number may go on behind the window, and of "1e+7" cut short up to two signs are left over.
                if end + 2 < len(self._text) or not self._more():
                    self._at = end
                    return value
            except RecursionError as error:
                raise UserError(f"{self._path}: its JSON is nested too deeply") from error
            except ValueError as error:
                if len(self._text) - self._at > _LARGEST_RECORD or not self._more():
                    where = error.pos if isinstance(error, json.JSONDecodeError) else self._at
                    self._fail(error.msg if isinstance(error, json.JSONDecodeError) else str(error), where)

    def _more(self) -> bool:
        """Move the window on by one chunk; False at the end of the file. What was taken leaves the window."""
        # A record longer than the window: twice as much at a time, or it would be parsed again and again.
        chunk = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        if not chunk:
            return False
        self._read += len(chunk) if chunk.isascii() else len(chunk.encode("utf-8"))
        self._bar.to(self._read / 1e6)
        self._line, self._column = self._place(self._at)
        self._text, self._at = self._text[self._at :] + chunk, 0
        return True

    def _place(self, at: int) -> tuple[int, int]:
        breaks = self._text.count("\n", 0, at)
        if not breaks:
            return self._line, self._column + at
        return self._line + breaks, at - self._text.rfind("\n", 0, at)

    def _fail(self, message: str, at: int | None = None) -> None:
        line, column = self._place(self._at if at is None else at)
        raise UserError(f"{self._path}: not valid JSON (line {line}, column {column}: {message})")
