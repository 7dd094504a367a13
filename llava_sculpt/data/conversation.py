"""LLaVA's v1 conversation: a record or a question to token ids, and the labels of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError

IMAGE_TOKEN_INDEX = -200  # placeholder of the image; the collator replaces it by the image tokens
IGNORE_INDEX = -100  # label of a token that is not trained on

IMAGE_PLACEHOLDER = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_END = "</s>"
_ANSWER_MARK = " ASSISTANT: "


def encode_record(record: dict[str, Any], tokenizer: LlavaTokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of one LLaVA training record, equal to the original package's.

    Returns two lists of one length: the ids, with BOS in front and ``IMAGE_TOKEN_INDEX`` for the image, and the
    labels, ``IGNORE_INDEX`` everywhere except on the answers and the ``</s>`` after each. Nothing is truncated.
    Raises UserError if ``record_problems`` finds any, or if the tokenizer joins a question and its answer.
    """
    problems = record_problems(record)
    if problems:
        raise UserError(problems)
    ids: list[int] = [tokenizer.bos_id]
    labels: list[int] = [IGNORE_INDEX]
    for number, (question, answer) in enumerate(_rounds(_from_human(record["conversations"]))):
        asked = _encode_round(question, None, number == 0, tokenizer)
        whole = _encode_round(question, answer, number == 0, tokenizer)
        if whole[: len(asked)] != asked:
            raise UserError(
                "the tokenizer joins 'ASSISTANT:' and the answer in one token, so that they cannot be "
                "separated; LLaVA-1.5 needs a Llama SentencePiece model"
            )
        ids += whole
        labels += [IGNORE_INDEX] * len(asked) + whole[len(asked) :]
    return ids, labels


def encode_prompt(
    question: str, tokenizer: LlavaTokenizer, has_image: bool, rounds: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """Ids of the prompt for generating an answer: system text, question, ``ASSISTANT:``; BOS in front.

    Questions come without ``<image>``: it is put in front of the first, on a line of its own, if ``has_image``.
    ``rounds``: (question, answer) of the conversation so far; they become the ids of training.
    Raises UserError if a question holds ``<image>``.
    """
    ids = [tokenizer.bos_id]
    for number, (asked, answer) in enumerate([*rounds, (question, None)]):
        if IMAGE_PLACEHOLDER in asked:
            raise UserError(f"the question {asked!r} holds {IMAGE_PLACEHOLDER}, which is put in front of it")
        if has_image and number == 0:
            asked = f"{IMAGE_PLACEHOLDER}\n{asked}"
        ids += _encode_round(asked, answer, number == 0, tokenizer)
    return ids


def last_question(record: dict[str, Any]) -> tuple[list[tuple[str, str]], str, str]:
    """What a sound record (`record_problems`) asks at its end: the rounds before, the last question, its gold answer.

    Questions are without ``<image>``, as `encode_prompt` takes them: asked so, the prompt has the ids of training.
    Raises UserError if the image does not stand in the first question, or the last one is empty.
    """
    rounds = _rounds(_from_human(record["conversations"]))
    bare = [(question.replace(IMAGE_PLACEHOLDER, "").strip(), answer) for question, answer in rounds]
    if any(IMAGE_PLACEHOLDER in question for question, _ in rounds[1:]):
        raise UserError(f"{IMAGE_PLACEHOLDER} should stand in the first question")
    if "image" not in record:
        bare = rounds
    question, answer = bare[-1]
    if not question.strip():
        raise UserError("the last question is empty")
    return bare[:-1], question, answer


def question_problems(question: str) -> list[str]:
    """Error messages about a question that a model is to answer, empty if it is valid.

    Beside what no training record may hold, ``<image>``: where there is a picture, it is put in front.
    """
    if not question.strip():
        return ["the question is empty"]
    if IMAGE_PLACEHOLDER in question:
        return [f"the question {question!r} holds {IMAGE_PLACEHOLDER}, which is put in front of it"]
    return _mark_problems(question, "-", True, f"the question {question!r}")


def record_problems(record: object) -> list[str]:
    """Error messages about one training record, empty if it is valid. Opens no files.

    A record whose first turn is not from the human is accepted and loses that turn, as in LLaVA.
    """
    if not isinstance(record, dict):
        return [f"is not a JSON object but {type(record).__name__}"]
    problems = []
    has_image = "image" in record
    if has_image and not (isinstance(record["image"], str) and record["image"].strip()):
        problems.append("'image' must be a file name; leave the key out of a sample without an image")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return [*problems, "has no 'conversations' (a list of human and gpt turns)"]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt"):
            problems.append(f"turn {number} needs 'from': 'human' or 'gpt'")
        elif not isinstance(turn.get("value"), str):
            problems.append(f"turn {number} needs a text in 'value'")
    if problems:
        return problems
    turns = _from_human(turns)
    return _order_problems(turns) or _placeholder_problems(turns, has_image) + _text_problems(turns)


def _order_problems(turns: list[dict[str, str]]) -> list[str]:
    if not turns:
        return ["has no human turn"]
    if any(turn["from"] != ("human", "gpt")[i % 2] for i, turn in enumerate(turns)):
        return ["human and gpt turns must alternate"]
    if len(turns) % 2:
        return ["the last human turn has no answer"]
    return []


def _placeholder_problems(turns: list[dict[str, str]], has_image: bool) -> list[str]:
    holders = [turn["from"] for turn in turns if IMAGE_PLACEHOLDER in turn["value"]]
    if not has_image:
        return [f"has {IMAGE_PLACEHOLDER} in the text but no 'image'"] if holders else []
    if not holders:
        return [f"has an 'image' but no {IMAGE_PLACEHOLDER} in the text"]
    if "gpt" in holders:
        return [f"has {IMAGE_PLACEHOLDER} in an answer"]
    count = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in _rounds(turns))
    if count > 1:
        return [f"has {IMAGE_PLACEHOLDER} in {count} places, for one image"]
    return []


def _text_problems(turns: list[dict[str, str]]) -> list[str]:
    problems = []
    for number, (question, answer) in enumerate(_rounds(turns), 1):
        if not question:
            problems.append(f"question {number} is empty")
        if not answer.strip():
            problems.append(f"answer {number} is empty")
        problems += _mark_problems(question, answer, number == 1, f"question or answer {number}")
    return problems


def _mark_problems(question: str, answer: str, first: bool, where: str) -> list[str]:
    """Marks of the conversation, and what is not text, in the text of a round."""
    marks = (_END, "<unk>")
    problems = [f"{token} occurs in the text of {where}" for token in marks if token in question or token in answer]
    # LLaVA splits question and answer at this mark: it must occur once, in its place.
    instruction = _instruction(question, first)
    expected = [instruction.removesuffix(_ANSWER_MARK[:-1]), answer]
    if f"{instruction} {answer}".split(_ANSWER_MARK) != expected:
        problems.append(f"'{_ANSWER_MARK}' occurs in the text of {where}")
    if any("\ud800" <= character <= "\udfff" for character in question + answer):
        problems.append(f"{where} holds half of a surrogate pair, which is not text")
    return problems


def _from_human(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return turns if turns[0]["from"] == "human" else turns[1:]


def _rounds(turns: list[dict[str, str]]) -> list[tuple[str, str]]:
    """(question, answer) of alternating turns, with the image placeholder moved to the front."""
    return [(_image_to_front(turns[i]["value"]), turns[i + 1]["value"]) for i in range(0, len(turns), 2)]


def _image_to_front(question: str) -> str:
    if IMAGE_PLACEHOLDER not in question:
        return question
    return f"{IMAGE_PLACEHOLDER}\n{question.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def _instruction(question: str, first: bool) -> str:
    """The text of a round before its answer, without the space in front of the answer."""
    return (SYSTEM + " " if first else "") + f"USER: {question} ASSISTANT:"


def _encode_round(question: str, answer: str | None, first: bool, tokenizer: LlavaTokenizer) -> list[int]:
    """Ids of a round, up to where its answer begins if that is None."""
    text = _instruction(question, first) + ("" if answer is None else f" {answer}{_END}")
    # A turn after </s> gets no leading space: encode it with that token, then drop the token.
    return _encode_with_image(text, tokenizer) if first else _encode_with_image(_END + text, tokenizer)[1:]


def _encode_with_image(text: str, tokenizer: LlavaTokenizer) -> list[int]:
    """Encode the text around each placeholder on its own, with ``IMAGE_TOKEN_INDEX`` in between."""
    ids: list[int] = []
    for i, chunk in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if i:
            ids.append(IMAGE_TOKEN_INDEX)
        ids += tokenizer.encode(chunk)
    return ids
