"""VQA accuracy against ten human answers: OK-VQA (two official variants) and TextVQA (m4c processing)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers.answer_text import drop_punctuation, flatten, normalise
from llava_sculpt.evaluation.scorers.score import QuestionId, Score, match_predictions, mean

OKVQA_VARIANTS = ("authors", "official")


def score_okvqa(gold: dict[str, Any], predictions: Iterable[tuple[QuestionId, str]], variant: str = "authors") -> Score:
    """VQA accuracy on OK-VQA.

    `gold`: VQA annotation file {"annotations": [{"question_id", "answers": [{"answer", ...}]}]}; it is not
    changed. `variant` "authors": the evaluator of 2016 that LLaVA's forks and the paper use; "official": that
    of 2021. They differ in which side is normalised, see `_authors` and `_official`. Raises UserError on
    missing, duplicate or unknown ids.
    """
    if variant not in OKVQA_VARIANTS:
        raise UserError(f"OK-VQA scorer variant must be one of {', '.join(OKVQA_VARIANTS)}, got {variant!r}")
    answers = {record["question_id"]: record["answers"] for record in gold["annotations"]}
    texts = match_predictions(predictions, answers, "okvqa")
    compare = _authors if variant == "authors" else _official
    accuracies = {qid: _leave_one_out(*compare(texts[qid], given)) for qid, given in answers.items()}
    score = 100 * sum(accuracies.values()) / len(accuracies)
    return Score(score, len(accuracies), "VQA accuracy", variant, _percent(accuracies))


def score_textvqa(gold: dict[str, Any], predictions: Iterable[tuple[QuestionId, str]]) -> Score:
    """VQA accuracy on TextVQA with the m4c evaluator's processing of both sides.

    `gold`: {"data": [{"question_id", "answers": [10 texts]}]}. Raises UserError on missing, duplicate or
    unknown ids, and on a question without exactly 10 answers.
    """
    answers = {record["question_id"]: record["answers"] for record in gold["data"]}
    wrong = [qid for qid, given in answers.items() if len(given) != 10]
    if wrong:
        raise UserError(f"textvqa: these questions do not have exactly 10 answers: {wrong[:5]}")
    texts = match_predictions(predictions, answers, "textvqa")
    accuracies = {
        qid: _leave_one_out(_m4c(texts[qid]), list(enumerate(map(_m4c, given)))) for qid, given in answers.items()
    }
    return Score(100 * mean(accuracies.values()), len(accuracies), "VQA accuracy", "m4c", _percent(accuracies))


def _leave_one_out(prediction: str, answers: Sequence[tuple[Any, str]]) -> float:
    """Mean over annotators of min(1, matches among the other annotators / 3): 1/2/3/4 of 10 -> 0.3/0.6/0.9/1.

    `answers` are (annotator, answer) pairs. "The others" are the pairs that differ from the one left out, so
    that two identical annotation records count as one annotator, as in the official code.
    """
    accuracies = []
    for left_out in answers:
        matches = sum(other != left_out and other[1] == prediction for other in answers)
        accuracies.append(min(1, matches / 3))
    return mean(accuracies)


def _percent(accuracies: dict[QuestionId, float]) -> dict[QuestionId, float]:
    return {question_id: 100 * accuracy for question_id, accuracy in accuracies.items()}


def _authors(prediction: str, answers: list[dict[str, Any]]) -> tuple[str, list[tuple[Any, str]]]:
    """The prediction is always normalised; gold loses only its punctuation, and only if not unanimous.

    A gold "two" or "Fire truck" can therefore never be matched.
    """
    texts = [record["answer"] for record in answers]
    if len(set(texts)) > 1:
        texts = [drop_punctuation(text) for text in texts]
    return normalise(flatten(prediction)), _with_annotator(answers, texts)


def _official(prediction: str, answers: list[dict[str, Any]]) -> tuple[str, list[tuple[Any, str]]]:
    """Both sides are normalised if gold is not unanimous, otherwise neither is."""
    texts = [flatten(record["answer"]) for record in answers]
    prediction = flatten(prediction)
    if len(set(texts)) > 1:
        texts = [normalise(text) for text in texts]
        prediction = normalise(prediction)
    return prediction, _with_annotator(answers, texts)


def _with_annotator(answers: list[dict[str, Any]], texts: list[str]) -> list[tuple[Any, str]]:
    others = [{key: value for key, value in record.items() if key != "answer"} for record in answers]
    return list(zip(others, texts, strict=True))


def _m4c(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(flatten(text))
