"""Conversations: what is supervised, and which records are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_sculpt.data.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    encode_prompt,
    encode_record,
    record_problems,
)
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError

MakeRecord = Callable[..., dict[str, Any]]
words = st.text(st.sampled_from("ab c\nd.?Aé "), min_size=1, max_size=20)
answers = words.filter(lambda text: bool(text.strip()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(words, answers), min_size=1, max_size=4), st.booleans())
def test_exactly_the_answers_and_their_ends_are_supervised(
    make_record: MakeRecord, tokenizer: LlavaTokenizer, rounds: list[tuple[str, str]], with_image: bool
) -> None:
    texts = [text for pair in rounds for text in pair]
    record = make_record(*texts)
    if with_image:
        record = make_record(texts[0] + "<image>", *texts[1:], image="a.png")
    ids, labels = encode_record(record, tokenizer)
    assert len(ids) == len(labels)
    assert ids.count(IMAGE_TOKEN_INDEX) == with_image
    assert all(label in (IGNORE_INDEX, index) for index, label in zip(ids, labels, strict=True))
    supervised = [label for label in labels if label != IGNORE_INDEX]
    said = tokenizer.decode(supervised, skip_special=False)
    # The space between "ASSISTANT:" and the first answer is dropped in decoding, like any space in front.
    assert said == " ".join(f"{answer}</s>" for _, answer in rounds)


def test_the_image_goes_to_the_front_of_its_turn(make_record: MakeRecord, tokenizer: LlavaTokenizer) -> None:
    front = encode_record(make_record("<image>\nlook here", "dog", image="a"), tokenizer)
    assert encode_record(make_record("look here\n<image>", "dog", image="a"), tokenizer) == front
    assert encode_record(make_record(" lo<image>ok here ", "dog", image="a"), tokenizer) == front
    assert encode_record(make_record("<image> look here<image> ", "dog", image="a"), tokenizer) == front


def test_the_prompt_is_the_training_text_up_to_the_answer(make_record: MakeRecord, tokenizer: LlavaTokenizer) -> None:
    ids, labels = encode_record(make_record("<image>\nWhat?", "dog", image="a"), tokenizer)
    asked = labels.count(IGNORE_INDEX)
    assert encode_prompt("What?", tokenizer, has_image=True) == ids[:asked]


def test_a_prompt_with_a_placeholder_of_its_own_is_refused(tokenizer: LlavaTokenizer) -> None:
    with pytest.raises(UserError, match="<image>"):
        encode_prompt("<image>\nWhat?", tokenizer, has_image=True)


HUMAN = {"from": "human", "value": "q"}
GPT = {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([], "not a JSON object"),
        ({}, "no 'conversations'"),
        ({"conversations": []}, "no 'conversations'"),
        ({"conversations": "q"}, "no 'conversations'"),
        ({"conversations": ["q", "a"]}, "turn 1 needs 'from'"),
        ({"conversations": [{"from": "user", "value": "q"}, GPT]}, "turn 1 needs 'from'"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "turn 2 needs a text"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "answer 1 is empty"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": " \n"}]}, "answer 1 is empty"),
        ({"conversations": [{"from": "human", "value": ""}, GPT]}, "question 1 is empty"),
        ({"conversations": [HUMAN]}, "the last human turn has no answer"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "the last human turn has no answer"),
        ({"conversations": [GPT]}, "no human turn"),
        ({"conversations": [HUMAN, HUMAN, GPT, GPT]}, "must alternate"),
        ({"conversations": [GPT, GPT, HUMAN, GPT]}, "must alternate"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "a</s>b"}]}, "</s> occurs in"),
        ({"conversations": [{"from": "human", "value": "an <unk>"}, GPT]}, "<unk> occurs in"),
        ({"conversations": [{"from": "human", "value": "x ASSISTANT: y"}, GPT]}, "' ASSISTANT: ' occurs in"),
        ({"conversations": [{"from": "human", "value": "ASSISTANT: y"}, GPT]}, "' ASSISTANT: ' occurs in"),
        ({"conversations": [{"from": "human", "value": "x ASSISTANT:"}, GPT]}, "' ASSISTANT: ' occurs in"),
        ({"conversations": [{"from": "human", "value": "\ud800"}, GPT]}, "surrogate"),
        ({"image": "a.png", "conversations": [HUMAN, GPT]}, "has an 'image' but no <image>"),
        ({"conversations": [{"from": "human", "value": "<image>"}, GPT]}, "<image> in the text but no 'image'"),
        ({"image": None, "conversations": [HUMAN, GPT]}, "'image' must be a file name"),
        ({"image": ["a", "b"], "conversations": [HUMAN, GPT]}, "'image' must be a file name"),
        (
            {"image": "a", "conversations": [{"from": "human", "value": "<image>"}, GPT] * 2},
            "<image> in 2 places",
        ),
        (
            {"image": "a", "conversations": [{"from": "human", "value": "<image><im<image>age>"}, GPT]},
            "<image> in 2 places",
        ),
        ({"image": "a", "conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]}, "in an answer"),
    ],
)
def test_a_malformed_record_is_described_and_not_encoded(record: Any, words: str, tokenizer: LlavaTokenizer) -> None:
    assert any(words in problem for problem in record_problems(record)), record_problems(record)
    with pytest.raises(UserError):
        encode_record(record, tokenizer)


def test_all_problems_of_a_record_are_told(make_record: MakeRecord) -> None:
    assert len(record_problems(make_record("q", "", "</s>", "a", "<unk>", "a"))) == 3
