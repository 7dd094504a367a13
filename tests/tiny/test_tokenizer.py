"""The tiny tokenizer: a Llama SentencePiece model that keeps the original LLaVA's label arithmetic whole."""

from __future__ import annotations

import pytest
import sentencepiece

from llava_sculpt.data.conversation import IGNORE_INDEX, encode_prompt, encode_record
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.tasks.questions import SHORT_ANSWER
from llava_sculpt.tiny.pretraining.vocabulary import VOCABULARY, train_tokenizer


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(0)


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> LlavaTokenizer:
    return LlavaTokenizer(model)


@pytest.fixture(scope="module")
def pieces(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def test_it_is_reproducible(model: bytes) -> None:
    assert train_tokenizer(0) == model


def test_it_has_the_pieces_of_a_llama_tokenizer(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert pieces.GetPieceSize() == VOCABULARY
    assert [pieces.IdToPiece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (VOCABULARY + 2) % 64 == 0  # with <image> and padding no row of the embedding is wasted
    for piece in ("\u2581", "<0x0A>", *(f"<0x{byte:02X}>" for byte in range(256))):
        assert pieces.PieceToId(piece) != pieces.unk_id()


def test_user_is_one_token_and_two_with_a_space(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert pieces.EncodeAsPieces("USER") == ["\u2581", "USER"]
    assert pieces.PieceToId("\u2581USER") == pieces.unk_id()


def test_the_space_behind_assistant_is_a_token_of_its_own(tokenizer: LlavaTokenizer) -> None:
    assert len(tokenizer.encode("A ASSISTANT: ")) == len(tokenizer.encode("A ASSISTANT:")) + 1


@pytest.mark.parametrize(
    "text", ["What is to the left of the dog?", "Größe 42 → \U0001f436\nnew line", " two  spaces "]
)
def test_text_comes_back(tokenizer: LlavaTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_prompt_is_short(tokenizer: LlavaTokenizer) -> None:
    # Speed of the whole laptop scale hangs on it: system text and suffix are single pieces.
    assert len(encode_prompt(f"What color is the circle?{SHORT_ANSWER}", tokenizer, has_image=True)) <= 22


def test_labels_of_two_turns_are_the_two_answers(tokenizer: LlavaTokenizer) -> None:
    turns = [
        ("human", "<image>\nWho wrote this book?"),
        ("gpt", "smith"),
        ("human", "Is it red?"),
        ("gpt", "no"),
    ]
    record = {"image": "a.jpg", "conversations": [{"from": who, "value": text} for who, text in turns]}
    _, labels = encode_record(record, tokenizer)
    assert tokenizer.decode([label for label in labels if label != IGNORE_INDEX], skip_special=False) == (
        "smith</s> no</s>"
    )
