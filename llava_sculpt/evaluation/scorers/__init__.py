"""The scorers of the six benchmarks, equal to the evaluators of the paper also in the corners."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers.caption import score_captions
from llava_sculpt.evaluation.scorers.exact import score_exact
from llava_sculpt.evaluation.scorers.gqa import score_gqa
from llava_sculpt.evaluation.scorers.score import QuestionId, Score
from llava_sculpt.evaluation.scorers.vqa import score_okvqa, score_textvqa

__all__ = ["Score", "score_predictions"]


def score_predictions(
    task: str, gold: Any, predictions: Iterable[tuple[QuestionId, str]], *, okvqa_variant: str = "authors"
) -> Score:
    """Score (question id, text) pairs of `task` against `gold` in that benchmark's official annotation
    format.

    `okvqa_variant` is "authors" (the paper's) or "official" and concerns OK-VQA only. Raises UserError for an
    unknown task and for predictions that do not fit the gold answers one to one.
    """
    if task == "okvqa":
        return score_okvqa(gold, predictions, okvqa_variant)
    if task == "textvqa":
        return score_textvqa(gold, predictions)
    if task == "gqa":
        return score_gqa(gold, predictions)
    if task in ("ocrvqa", "iconqa"):
        return score_exact(gold, predictions, task)
    if task == "coco":
        return score_captions(gold, predictions)
    raise UserError(f"no scorer for the task {task!r}")
