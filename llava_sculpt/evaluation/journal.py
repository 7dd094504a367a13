"""What an evaluation has answered so far, on disk while it runs, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llava_sculpt.errors import UserError
from llava_sculpt.records import check_regular

Answers = dict[Any, str]  # by question_id


def answer_record(question_id: Any, text: str) -> dict[str, Any]:
    """An answer as it stands in a line, with the checksum that tells a damaged one."""
    checksum = zlib.crc32(json.dumps([question_id, text]).encode())
    return {"question_id": question_id, "text": text, "crc32": checksum}


class Journal:
    """The answers to one task's questions: one append-only file per process beside the predictions.

    `TASK.part<rank>.jsonl` begins with a line {"key": ...}, then holds an `answer_record` a line. `key` stands for all
    that decides an answer; files with another key are of another evaluation. A line without its end, left by a killed
    process, does not count.
    """

    def __init__(self, folder: Path, task: str, key: str) -> None:
        self.folder, self.task, self.key = folder, task, key
        self._stream: BinaryIO | None = None

    def parts(self) -> list[Path]:
        """The files there are, of any number of processes."""
        return sorted(self.folder.glob(f"{self.task}.part*.jsonl"))

    def read(self) -> Answers:
        """All answers so far. Files of another evaluation, or damaged ones, are deleted, with a message on stderr."""
        answers: Answers = {}
        for part in self.parts():
            check_regular(part)
            try:
                content = part.read_bytes()
            except OSError as error:
                raise UserError(f"{part}: cannot be read: {error.strerror}") from error
            lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
            try:
                records = [json.loads(line) for line in lines]
                if records and records[0] != {"key": self.key}:
                    raise ValueError("of another model, other questions or other settings")
                if any(record != answer_record(record["question_id"], record["text"]) for record in records[1:]):
                    raise ValueError("an answer is damaged")
                answers |= {record["question_id"]: record["text"] for record in records[1:]}
            except (ValueError, TypeError, KeyError) as error:
                print(f"{part}: not continued: {error}; starting {self.task} anew", file=sys.stderr)
                part.unlink()
        return answers

    def count(self) -> int:
        """How many answers there are so far, of all processes."""
        return sum(max(0, part.read_bytes().count(b"\n") - 1) for part in self.parts())

    def append(self, answers: Mapping[Any, str], rank: int) -> None:
        """Add answers to this process's file; after it returns, killing the process does not lose them."""
        if self._stream is None:
            self._stream = self._open(self.folder / f"{self.task}.part{rank}.jsonl")
        lines = [json.dumps(answer_record(q, text), ensure_ascii=False) for q, text in answers.items()]
        self._stream.write("".join(line + "\n" for line in lines).encode())
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def remove(self) -> None:
        """Delete the files: the predictions are complete and written."""
        for part in self.parts():
            part.unlink()

    def _open(self, path: Path) -> BinaryIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab")
        content = path.read_bytes()
        stream.truncate(content.rfind(b"\n") + 1)  # a torn line would run into the next one
        if b"\n" not in content:
            stream.write(json.dumps({"key": self.key}).encode() + b"\n")
        return stream
