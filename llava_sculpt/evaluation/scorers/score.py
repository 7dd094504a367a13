"""The result of a scorer, and the check that predictions and gold answers are about the same questions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from llava_sculpt.errors import UserError

QuestionId: TypeAlias = int | str


@dataclass(frozen=True)
class Score:
    """A benchmark's score on the paper's scale (percent; CIDEr x 100).

    `per_item` holds each question's own score on the same scale; `extra` holds further numbers of the
    benchmark (GQA: binary and open accuracy), also in percent.
    """

    score: float
    n: int
    metric: str
    variant: str
    per_item: dict[QuestionId, float]
    extra: dict[str, float] = field(default_factory=dict)


def match_predictions(
    predictions: Iterable[tuple[QuestionId, str]],
    required: Collection[QuestionId],
    what: str,
    *,
    ignored: Collection[QuestionId] = (),
) -> dict[QuestionId, str]:
    """Prediction text by question id, with exactly one for every id in `required`.

    Predictions for ids in `ignored` are dropped. Missing, duplicate and unknown ids raise one UserError that
    names some of each: the official scripts let the last duplicate win or fail in the middle, which hides
    broken runs.
    """
    wanted, dropped = set(required), set(ignored)
    found: dict[QuestionId, str] = {}
    duplicate: list[QuestionId] = []
    unknown: list[QuestionId] = []
    for question_id, text in predictions:
        if question_id in found:
            duplicate.append(question_id)
        elif question_id in wanted:
            found[question_id] = text
        elif question_id not in dropped:
            unknown.append(question_id)
    missing = [question_id for question_id in required if question_id not in found]
    problems = [
        f"{what}: {len(ids)} {kind}: {', '.join(map(repr, ids[:5]))}{' ...' if len(ids) > 5 else ''}"
        for kind, ids in (
            ("questions without a prediction", missing),
            ("predictions for a question that already has one", duplicate),
            ("predictions for unknown question ids", unknown),
        )
        if ids
    ]
    if missing and unknown and {str(i) for i in missing} & {str(i) for i in unknown}:
        problems.append(f"{what}: some ids are numbers in one file and texts in the other; write them alike")
    if not wanted:
        problems.append(f"{what}: there are no gold answers to score against")
    if problems:
        raise UserError(problems)
    return found


def mean(values: Collection[float]) -> float:
    """Plain left-to-right mean, the official evaluators' order of summation."""
    return sum(values) / len(values)
