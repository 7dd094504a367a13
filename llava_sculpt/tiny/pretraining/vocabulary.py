"""The tiny world's tokenizer: a Llama-style SentencePiece model trained on the world's own text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from random import Random

import sentencepiece

from llava_sculpt.data.conversation import SYSTEM
from llava_sculpt.tasks.coco import DEFAULT_TEST_PROMPT, TRAIN_PROMPTS
from llava_sculpt.tasks.iconqa import INSTRUCTIONS
from llava_sculpt.tasks.questions import SHORT_ANSWER
from llava_sculpt.tiny.assets import ICONS
from llava_sculpt.tiny.facts import AUTHORS, FACTS, GENRES, SIGN_WORDS, TITLE_WORDS
from llava_sculpt.tiny.sources import SOURCES
from llava_sculpt.tiny.targets import coco, iconqa

# Pieces; with <image> and <pad> the embedding has 896 rows, a multiple of 64.
VOCABULARY = 894

# `USER` must be one token and ` USER` two, as the original LLaVA's label arithmetic expects of a later turn.
# The two sentences of every sample are one piece each, which shortens a sample by a third. Words that begin a line
# would be split into letters, because BPE learns words with the space in front of them.
_WHOLE = ("USER", SYSTEM, SHORT_ANSWER.strip(), *"What Which Who Where When How Is Choose Answer".split())
_WORD_REPEATS = 40


def _lines(seed: int, samples: int) -> Iterator[str]:
    """Text in the proportions of the six tasks."""
    rng = Random(f"tokenizer/{seed}")
    yield from (*TRAIN_PROMPTS, DEFAULT_TEST_PROMPT, *INSTRUCTIONS.values(), "ASSISTANT: USER: Reference OCR token:")
    facts = [value for known in FACTS.values() for value in known.values()]
    for word in (*SIGN_WORDS, *TITLE_WORDS, *AUTHORS, *GENRES, *ICONS, *facts):
        yield from [word] * _WORD_REPEATS
    for _ in range(samples):
        for source in SOURCES.values():
            for question in source(rng)[1]:
                yield f"{question.text} ASSISTANT: {question.answer}"
        choice = iconqa(rng)[1]
        yield choice.question
        yield from (f"{letter}. {text}" for letter, text in zip("ABCDE", choice.choices, strict=False))
        yield choice.choices[choice.answer]
        yield from coco(rng)[1]


def train_tokenizer(seed: int = 0, samples: int = 300) -> bytes:
    """The bytes of a `tokenizer.model`: BPE with byte fallback, split digits, a dummy prefix, as Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(seed, samples),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        max_sentence_length=4192,
        user_defined_symbols=[text.replace(" ", "\u2581") for text in _WHOLE],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, seed: int = 0) -> None:
    """Write `tokenizer.model` into a checkpoint folder."""
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed))
