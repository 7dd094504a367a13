"""The tokenizer: specials, spaces, decoding, bad files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError

TOKENIZER = LlavaTokenizer.from_dir(Path(__file__).resolve().parent / "fixtures")
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581<"), max_size=60)


@given(texts)
def test_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(texts, texts)
def test_a_special_token_cuts_the_text_in_two(left: str, right: str) -> None:
    ids = TOKENIZER.encode(f"{left}</s>{right}")
    cut = ids.index(TOKENIZER.eos_id)
    assert ids[:cut] == TOKENIZER.encode(left)
    # A text that begins behind a left-out token loses its first space, as in Llama's own tokenizer.
    assert TOKENIZER.decode(ids) == (left + right if left else right.removeprefix(" "))
    assert TOKENIZER.decode(ids, skip_special=False) == f"{left}</s>{right}"


def test_empty_text_has_no_ids() -> None:
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.decode([]) == ""


def test_specials_in_the_text_become_their_ids() -> None:
    assert TOKENIZER.encode("<s></s><unk>") == [TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.unk_id]


def test_a_role_name_has_a_space_in_front_at_the_beginning_but_not_behind_an_end() -> None:
    alone, behind = TOKENIZER.encode("USER"), TOKENIZER.encode("</s>USER")[1:]
    assert len(alone) == 2
    assert behind == alone[1:]


def test_image_and_padding_ids_are_left_out_of_the_text_or_refused() -> None:
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("a dog"), TOKENIZER.vocab_size, TOKENIZER.vocab_size + 1, -200]
    assert TOKENIZER.decode(ids) == "a dog"
    with pytest.raises(ValueError, match="not in the vocabulary"):
        TOKENIZER.decode(ids, skip_special=False)


def test_it_travels_to_other_processes() -> None:
    text = "</s>USER:  what\nis it"
    assert pickle.loads(pickle.dumps(TOKENIZER)).encode(text) == TOKENIZER.encode(text)


def test_a_missing_or_broken_model_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model: cannot read"):
        LlavaTokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: .*not a SentencePiece model"):
        LlavaTokenizer.from_dir(tmp_path)
