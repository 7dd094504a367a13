"""One preparation of a data set: its request, what has been read so far, and the prepared folder at the end."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from llava_sculpt.errors import UserError
from llava_sculpt.locks import folder_lock
from llava_sculpt.records import file_sha256, read_object, write_atomically
from llava_sculpt.tasks.common import MANIFEST, Record, json_lines
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.questions import Question, question_lines, read_question_file

T = TypeVar("T")

_ALL_FILES = {"train.json"} | {f"{s}{end}" for s in ("val", "test") for end in (".jsonl", "_annotations.json")}


@dataclass
class Preparation:
    """The options that all data sets share, and the steps of every `prepare`: require, draw, ask, write.

    `own` are the values of the data set's own options, `sources` the files that it is made of, by name. `train` are the
    training records, `lines` the question lines of the other splits, and `gold` their gold answers in the benchmark's
    official format; `ask` fills in all three, the gold answers as a list of question ids and answers, which a `prepare`
    may replace.
    """

    name: str
    raw: Path
    out: Path
    own: dict[str, Any]
    _: KW_ONLY
    samples: Annotated[int, "random training samples"] = 10_000
    val_samples: Annotated[int, "random validation questions"] = 1_000
    seed: Annotated[int, "of every random choice"] = 0
    questions: Annotated[Path | None, "question file: ask these questions in the test split"] = None
    overwrite: Annotated[bool, "replace a folder prepared otherwise, or files that are not ours"] = False
    problems: Problems = field(default_factory=Problems, init=False)
    gold: dict[str, Any] = field(default_factory=dict, init=False)
    sources: dict[str, Path] = field(default_factory=dict, init=False)
    _counts: dict[str, dict[str, int | None]] = field(default_factory=dict, init=False)
    lines: dict[str, list[Record]] = field(default_factory=dict, init=False)
    train: list[Record] | None = field(default=None, init=False)

    def find(self, *places: str) -> Path | None:
        """The first of `places` (relative to the raw folder) that is a file."""
        return next((self.raw / place for place in places if (self.raw / place).is_file()), None)

    def require(self, *places: str, hint: str = "") -> Path:
        """`find`, noted as a source of the prepared data. UserError with all places and `hint` if there is none."""
        path = self.find(*places)
        if path is None:
            named = " or ".join(str(self.raw / place) for place in places)
            raise UserError(f"{named}: file not found" + (f". {hint}" if hint else ""))
        self.sources[path.name] = path
        return path

    def count(self, name: str, found: int, official: int | None) -> None:
        """Note how many records the raw files hold and the official release has (None: not known for certain)."""
        self._counts[name] = {"found": found, "official": official}

    def draw(self, split: str, records: Sequence[T], official: int | None, test_samples: int | None = None) -> list[T]:
        """Count `records` and draw the split's sample of them, in their order; all of test without `test_samples`."""
        self.count(split, len(records), official)
        count = {"train": self.samples, "val": self.val_samples}.get(split, test_samples)
        return list(records) if count is None else self._subset(split, records, count)

    def _subset(self, split: str, records: Sequence[T], count: int) -> list[T]:
        if count < 1:
            raise UserError(f"number of samples must be at least 1, got {count}")
        if len(records) <= count:
            return list(records)
        # Each split has a random stream of its own, so that one option never changes another's sample.
        chosen = random.Random(f"{self.name}/{split}/{self.seed}").sample(range(len(records)), count)
        return [records[i] for i in sorted(chosen)]

    def ask(self, split: str, drawn: list[Question], file: Path, images: Path | None = None) -> list[Question]:
        """Make the records of a split from `drawn`; for test from the question file, if one is given.

        `file` is what messages name, `images` the image folder (default: the raw folder). Returns the questions
        asked. Missing images are noted.
        """
        if split == "test" and self.questions:
            with self.problems.gather(self.questions):
                drawn = read_question_file(self.questions, drawn, self.problems)
        lines = question_lines(images or self.raw, drawn, file, self.problems)
        if split == "train":
            asked = zip(drawn, lines, strict=True)
            self.train = [_train_record(f"{self.name}_{q.question_id}", line["image"], q) for q, line in asked]
        else:
            self.lines[split] = lines
            self.gold[split] = [{"question_id": q.question_id, "answer": q.answer} for q in drawn]
        return drawn

    def write(self, prompt_style: str, license: str, images: Path | None = None, **further: str) -> Record:
        """Check all images, then write the prepared folder; returns its manifest, with what is `further` in it.

        Every file is written aside and renamed, the manifest last: a folder with a manifest is complete. The same
        request on the same sources leaves a complete folder untouched, and goes on with a half written one; a folder
        made from another request or other sources, or with files of the same names that are not ours, is refused
        (UserError) without `overwrite`. Raises UserError with all problems noted.
        """
        self.problems.raise_with_images()
        try:
            files = self._contents()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self.name}: a text of the raw files holds half of a surrogate pair: {error.object!r}"
            ) from error
        manifest = {**self._manifest(files, prompt_style, license, images or self.raw), **further}
        if not self.overwrite and self._is_there(manifest):
            return manifest
        with folder_lock(self.out):
            try:
                if not self.overwrite and not (self.out / MANIFEST).exists():
                    self._check_foreign(files)
                (self.out / MANIFEST).unlink(missing_ok=True)
                for stale in _ALL_FILES - files.keys():
                    (self.out / stale).unlink(missing_ok=True)
                for file, content in files.items():
                    write_atomically(self.out / file, content)
                write_atomically(self.out / MANIFEST, _json_bytes(manifest))
            except OSError as error:
                raise UserError(f"{self.out}: cannot write the prepared data: {error}") from error
        return manifest

    def _is_there(self, manifest: Record) -> bool:
        """Whether the folder is complete. UserError if it was made from another request or other sources."""
        path = self.out / MANIFEST
        if not path.exists():
            return False
        old = read_object(path)
        changed = sorted(key for key in old.keys() | manifest.keys() if old.get(key) != manifest.get(key))
        if changed:
            raise UserError(
                f"{self.out}: holds data prepared differently (differs in: {', '.join(changed)}). "
                "Choose another place (--out, --name), or pass --overwrite to replace it."
            )
        hashes = manifest["files"].items()
        return all((self.out / file).is_file() and file_sha256(self.out / file) == hashed for file, hashed in hashes)

    def _check_foreign(self, files: dict[str, bytes]) -> None:
        """Without a manifest only what a killed preparation has written is ours: the very same content."""
        there = [self.out / name for name in sorted(_ALL_FILES) if os.path.lexists(self.out / name)]
        foreign = [path.name for path in there if not path.is_file() or path.read_bytes() != files.get(path.name)]
        if foreign:
            raise UserError(
                f"{self.out}: holds files that this preparation did not write: {', '.join(foreign)}. "
                "Choose another place (--out, --name), or pass --overwrite to replace them."
            )

    def _contents(self) -> dict[str, bytes]:
        files = {} if self.train is None else {"train.json": _json_bytes(self.train)}
        for split, lines in self.lines.items():
            files[f"{split}.jsonl"] = json_lines(lines)
            files[f"{split}_annotations.json"] = _json_bytes(self.gold[split])
        return files

    def _manifest(self, files: dict[str, bytes], prompt_style: str, license: str, images: Path) -> Record:
        splits = {split: {"n": len(lines)} for split, lines in self.lines.items()}
        if self.train is not None:
            splits["train"] = {"n": len(self.train)}
        sources, style = dict(self.sources), [prompt_style] if prompt_style else []
        if self.questions:
            sources[self.questions.name] = self.questions
            style.append(f"test as in {self.questions.name}")
        return {
            "name": self.name,
            "splits": splits,
            # Images are not copied: they stay in the raw download.
            "image_folder": os.path.relpath(images.resolve(), self.out.resolve()),
            "source_counts": self._counts,
            "seed": self.seed,
            "samples": self.samples if self.train is not None else None,
            "options": {**self.own, "val_samples": self.val_samples},
            "prompt_style": ", ".join(style),
            "license": license,
            "source_files": {name: file_sha256(path) for name, path in sources.items()},
            "files": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
        }


def _train_record(record_id: str, image: str, question: Question) -> Record:
    """One sample of LLaVA's training JSON."""
    turns = [{"from": "human", "value": f"<image>\n{question.prompt}"}, {"from": "gpt", "value": question.answer}]
    return {"id": record_id, "image": image, "conversations": turns}


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
