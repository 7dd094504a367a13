"""All errors in a data set's files, collected and reported together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from llava_sculpt.data.image_check import check_images, outside_problem
from llava_sculpt.errors import UserError

T = TypeVar("T")

# In full, 200,000 missing images would hide the one broken record beside them.
_SHOWN_PER_FILE = 20


class Problems:
    """Errors by file and record. The methods that read a field return None, and note why, where it is wrong."""

    def __init__(self) -> None:
        self._by_file: dict[str, list[str]] = {}
        self._images: dict[Path, tuple[Path, str]] = {}

    def add(self, file: Path, record: str, message: str) -> None:
        """Note that `record` (a human-readable position, "" for the whole file) of `file` is wrong."""
        messages = self._by_file.setdefault(str(file), [])
        message = f"{file}: {record}: {message}" if record else f"{file}: {message}"
        if messages[-1:] != [message]:  # a record that is no object is noted by each of its fields
            messages.append(message)

    def __len__(self) -> int:
        return sum(map(len, self._by_file.values()))

    @contextmanager
    def gather(self, file: Path) -> Iterator[None]:
        """Note a UserError of the block (a file that is broken as a whole) and go on behind it."""
        try:
            yield
        except UserError as error:
            self._by_file.setdefault(str(file), []).extend(error.problems)

    def raise_with_images(self) -> dict[Path, str]:
        """Read every image that `image` found, once, then `raise_if_any`; returns the sha256 of those just read."""
        bad, hashes = check_images(self._images)
        for path, problem in bad.items():
            self.add(*self._images[path], f"{problem}: {path}")
        self.raise_if_any()
        self._images.clear()
        return hashes

    def raise_if_any(self) -> None:
        """Raise one UserError with all problems; long lists of one file are cut after 20 with a count."""
        lines: list[str] = []
        for file, messages in self._by_file.items():
            lines += messages[:_SHOWN_PER_FILE]
            if len(messages) > _SHOWN_PER_FILE:
                lines.append(f"{file}: ... and {len(messages) - _SHOWN_PER_FILE} more problems")
        if lines:
            raise UserError(lines)

    def value(self, record: Any, key: str, kind: type[T], file: Path, where: str) -> T | None:
        """`record[key]` if it is a `kind` (and, for text, not blank); otherwise None, noted."""
        if not isinstance(record, dict):
            self.add(file, where, f"expected an object, found {type(record).__name__}")
            return None
        if key not in record:
            self.add(file, where, f"no field {key!r}")
            return None
        value = record[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.add(file, where, f"field {key!r} should be {kind.__name__}, found {type(value).__name__}")
            return None
        if isinstance(value, str) and not value.strip():
            self.add(file, where, f"field {key!r} is empty")
            return None
        if isinstance(value, str) and not is_text(value):
            self.add(file, where, f"field {key!r} holds half of a surrogate pair, which is not text")
            return None
        return value

    def fields(self, record: Any, file: Path, where: str, **kinds: type) -> list[Any] | None:
        """The values of several fields, by their kinds, or None if one is wrong. `question` is read as a question."""
        values = [
            self.question(record, key, file, where) if key == "question" else self.value(record, key, kind, file, where)
            for key, kind in kinds.items()
        ]
        return None if None in values else values

    def identifier(
        self, record: Any, key: str, file: Path, where: str, seen: set[int | str] | None = None
    ) -> int | str | None:
        """`record[key]` if it is a number or non-blank text, and not yet in `seen`, to which it is added."""
        if not isinstance(record, dict):
            self.add(file, where, f"expected an object, found {type(record).__name__}")
            return None
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            self.add(file, where, f"needs a number or a text under {key!r}")
            return None
        if seen is not None:
            if value in seen:
                self.add(file, where, f"{key} {value!r} occurs twice")
                return None
            seen.add(value)
        return value

    def texts(self, record: Any, key: str, file: Path, where: str, at_least: int = 1) -> list[str] | None:
        """`record[key]` if it is a list of at least `at_least` non-blank texts; otherwise None, noted."""
        values = self.value(record, key, list, file, where)
        if values is None:
            return None
        if len(values) < at_least:
            self.add(file, where, f"field {key!r} has {len(values)} entries, needs at least {at_least}")
            return None
        for position, value in enumerate(values):
            if not isinstance(value, str) or not value.strip() or not is_text(value):
                self.add(file, where, f"field {key!r}, entry {position}: should be non-empty text, found {value!r}")
                return None
        return values

    def question(self, record: Any, key: str, file: Path, where: str) -> str | None:
        """A question's text, which may not contain "<image>": training and evaluation would put the image there."""
        text = self.value(record, key, str, file, where)
        if text is not None and "<image>" in text:
            self.add(file, where, f"field {key!r} contains the reserved text '<image>'")
            return None
        return text

    def image(self, root: Path, candidates: Sequence[str], file: Path, where: str) -> str | None:
        """The first of `candidates` (relative to `root`) that is a file, to be read later; otherwise None, noted."""
        for candidate in candidates:
            if outside := outside_problem(root, candidate):
                self.add(file, where, outside)
                return None
            if os.path.isfile(root / candidate):
                self._images.setdefault(root / candidate, (file, where))
                return candidate
        self.add(file, where, f"image not found: {' or '.join(str(root / c) for c in candidates)}")
        return None


def is_text(value: str) -> bool:
    """Whether `value` can be written as UTF-8: JSON may hold half of a surrogate pair."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
