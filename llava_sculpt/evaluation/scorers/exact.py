"""Exact match without regard to case: OCR-VQA and IconQA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llava_sculpt.evaluation.scorers.score import QuestionId, Score, match_predictions


def score_exact(gold: Sequence[dict[str, Any]], predictions: Iterable[tuple[QuestionId, str]], what: str) -> Score:
    """Percentage of predictions with `prediction.lower() == answer.lower()`: no stripping, no punctuation
    removal.

    `gold`: [{"question_id", "answer"}]. `what` names the benchmark in messages. Raises UserError on missing,
    duplicate or unknown ids.
    """
    answers = {record["question_id"]: record["answer"] for record in gold}
    texts = match_predictions(predictions, answers, what)
    correct = {qid: texts[qid].lower() == answer.lower() for qid, answer in answers.items()}
    per_item: dict[QuestionId, float] = {qid: 100.0 * right for qid, right in correct.items()}
    score = 100 * sum(correct.values()) / len(correct)
    return Score(score, len(correct), "accuracy", "exact match, case-insensitive", per_item)
