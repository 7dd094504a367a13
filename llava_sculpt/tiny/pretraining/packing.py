"""Batches for pretraining: many questions about one picture share its prefix, each blind to the others.

A row is `<s> system USER: <image>` and a line break once, then for every question its text, its answer and
`</s>`. The attention mask lets a question see the prefix and itself, and its positions go on from the prefix:
to the model each question is exactly a single-turn sample of `encode_record`, with the picture computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llava_sculpt.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_record
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.tasks.questions import SHORT_ANSWER
from llava_sculpt.tiny.scenes import Item, patches_of
from llava_sculpt.tiny.sources import QA


@dataclass(frozen=True)
class Pointer:
    """A token at `position` that should attend to `keys`, both positions in its `row`.

    `mentioned`: the token names the object at `keys`; otherwise it is the last of the prompt, and they show the answer.
    """

    row: int
    position: int
    keys: list[int]
    mentioned: bool


@dataclass(frozen=True)
class Batch:
    """Text of B rows behind the image, n tokens long, in a layout of `before` + image + n positions.

    `ids`, `labels`: int64 [B, n]; `positions`: int64 [B, total]; `mask`: bool [B, 1, total, total], True =
    may see. `number`: int64 [B, n], the question of each token, from 1; 0 is the line break, -1 padding.
    """

    before: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    number: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    pointers: list[Pointer]


@dataclass
class Packer:
    """Encodes questions (each text once) and packs them."""

    tokenizer: LlavaTokenizer
    image_tokens: int
    _cache: dict[tuple[str, str], tuple[list[int], list[int]]] = field(default_factory=dict)
    _before: list[int] = field(default_factory=list)
    _behind: list[int] = field(default_factory=list)

    def encode(self, question: QA) -> tuple[list[int], list[int]]:
        """Ids and labels of one question behind the shared prefix."""
        key = question.text, question.answer
        if key not in self._cache:
            turns = [
                {"from": "human", "value": f"<image>\n{question.text}{SHORT_ANSWER}"},
                {"from": "gpt", "value": question.answer},
            ]
            ids, labels = encode_record({"image": "-", "conversations": turns}, self.tokenizer)
            at = ids.index(IMAGE_TOKEN_INDEX)
            self._before, self._behind = ids[:at], ids[at + 1 : at + 3]  # the space and the line break
            self._cache[key] = ids[at + 3 :], labels[at + 3 :]
        return self._cache[key]

    def pack(self, rows: list[list[QA]]) -> Batch:
        """One batch row per list of questions."""
        encoded = [[self.encode(question) for question in row] for row in rows]
        text = len(self._behind)
        length = text + max(sum(len(ids) for ids, _ in row) for row in encoded)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        ids[:, :text] = torch.tensor(self._behind)
        labels = torch.full_like(ids, IGNORE_INDEX)
        number = torch.full_like(ids, -1)
        number[:, :text] = 0
        prefix = len(self._before) + self.image_tokens
        positions = torch.arange(prefix + length).repeat(len(rows), 1)
        pointers: list[Pointer] = []
        for i, (row_of, row) in enumerate(zip(rows, encoded, strict=True)):
            start = text
            for n, (question_ids, question_labels) in enumerate(row, 1):
                end = start + len(question_ids)
                ids[i, start:end] = torch.tensor(question_ids)
                labels[i, start:end] = torch.tensor(question_labels)
                number[i, start:end] = n
                positions[i, prefix + start : prefix + end] = prefix + text + torch.arange(end - start)
                pointers += self._pointers(row_of[n - 1], question_ids, question_labels, i, prefix + start)
                start = end
        whole = torch.cat([torch.zeros(len(rows), prefix, dtype=torch.long), number], 1)
        same = (whole[:, :, None] == whole[:, None, :]) | (whole[:, None, :] == 0)
        causal = torch.ones(prefix + length, prefix + length, dtype=torch.bool).tril()
        before = torch.tensor(self._before)
        return Batch(before, ids, labels, number, positions, (same & causal)[:, None], pointers)

    def _pointers(self, question: QA, ids: list[int], labels: list[int], row: int, start: int) -> list[Pointer]:
        """Where the tokens of one question should look; what is not in the picture is looked for at `<s>`."""
        found = []
        for words, item in question.mentions:
            piece = self.tokenizer.encode(words)
            ends = [at + len(piece) for at in range(len(ids)) if ids[at : at + len(piece)] == piece]
            keys = self._keys(item) if item else [0]
            found.append(Pointer(row, start + ends[-1] - 1, keys, mentioned=True))
        if question.seen:
            last = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX) - 1
            found.append(Pointer(row, start + last, self._keys(question.seen), mentioned=False))
        return found

    def _keys(self, item: Item) -> list[int]:
        return [len(self._before) + patch for patch in patches_of(item)]
