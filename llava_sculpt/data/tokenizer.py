"""The Llama SentencePiece tokenizer as LLaVA-1.5 was trained with it (``legacy=False``, no fast variant)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece

from llava_sculpt.errors import UserError
from llava_sculpt.records import check_regular

_SPACE = "\u2581"  # SentencePiece writes a space as this character
# Appended to a serialized ModelProto this sets normalizer_spec.add_dummy_prefix = false: of a message field that occurs
# twice (field 3, two bytes long, in it field 3 = 0) protobuf merges the two, and the last value wins.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class LlavaTokenizer:
    """Text to ids and back, over a SentencePiece model with ``<unk>``, ``<s>`` and ``</s>``.

    Every encoded text gets a space in front, also when it already begins with one; a literal ``<s>``, ``</s>``
    or ``<unk>`` becomes its id, and the text after it gets no space. The tokenizer knows neither image nor padding:
    their ids begin at ``vocab_size``.
    """

    def __init__(self, model_proto: bytes) -> None:
        """``model_proto``: the bytes of a ``tokenizer.model``; UserError if they are not a usable one."""
        self._model_proto = model_proto
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_proto + _NO_DUMMY_PREFIX)
        except (RuntimeError, UnicodeError) as error:
            raise UserError(f"this is not a SentencePiece model ({error})") from error
        self.vocab_size: int = self._processor.GetPieceSize()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        self._specials = {"<s>": self.bos_id, "</s>": self.eos_id, "<unk>": self.unk_id}
        for piece, index in self._specials.items():
            if index < 0 or self._processor.IdToPiece(index) != piece:
                raise UserError(f"it has no {piece} token; LLaVA-1.5 needs a Llama SentencePiece model")
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self._specials)) + ")")
        self._guard = "<unk>"
        self._guard_length = len(self._processor.EncodeAsIds(self._guard))
        self._space_id: int = self._processor.PieceToId(_SPACE)

    @classmethod
    def from_dir(cls, path: str | Path) -> LlavaTokenizer:
        """Read ``tokenizer.model`` of a checkpoint folder; UserError if it is missing or broken."""
        file = Path(path) / "tokenizer.model"
        check_regular(file)
        try:
            return cls(file.read_bytes())
        except OSError as error:
            raise UserError(
                f"{file}: cannot read the tokenizer ({error.strerror}); a LLaVA-1.5 checkpoint folder holds the "
                "SentencePiece model of its language model there"
            ) from error
        except UserError as error:
            raise UserError(f"{file}: {error}") from error

    def __reduce__(self) -> tuple[Callable[[bytes], LlavaTokenizer], tuple[bytes]]:
        # The wrapped C++ object cannot be pickled for data loader workers.
        return type(self), (self._model_proto,)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without BOS and EOS. Empty text has no ids."""
        if not text:
            return []
        parts = self._special_pattern.split(_SPACE + text.replace(_SPACE, " "))
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                if ids == [self._space_id]:
                    ids = []  # the added space is not kept in front of a special token
                ids.append(self._specials[part])
            else:
                ids += self._encode_plain(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ``ids``, without the space that encoding put in front.

        ``skip_special`` leaves out ``<s>``, ``</s>``, ``<unk>`` and every id that is not in the vocabulary
        (image, padding); otherwise the first three are written out and the last are a ValueError.
        """
        names = {index: name for name, index in self._specials.items()}
        text = ""
        run: list[int] = []
        kept = [int(i) for i in ids]
        if skip_special:
            kept = [i for i in kept if 0 <= i < self.vocab_size and i not in names]
        for position, index in enumerate(kept):
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"id {index} at position {position} is not in the vocabulary")
            if index in names:
                text += self._processor.DecodeIds(run) + names[index]
                run = []
            else:
                run.append(index)
        text += self._processor.DecodeIds(run)
        starts_with_space = bool(kept) and self._processor.IdToPiece(kept[0]).startswith(_SPACE)
        return text[1:] if starts_with_space and text.startswith(" ") else text

    def _encode_plain(self, text: str) -> list[int]:
        if not text.startswith((_SPACE, " ")):
            return list(self._processor.EncodeAsIds(text))
        # SentencePiece may drop spaces at the beginning of a text, so something is put in front of them.
        return list(self._processor.EncodeAsIds(self._guard + text)[self._guard_length :])
