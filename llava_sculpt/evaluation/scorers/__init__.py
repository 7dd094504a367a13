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
from llava_sculpt.names import TASKS

__all__ = ["Score", "score_predictions"]


def score_predictions(
    task: str, gold: Any, predictions: Iterable[tuple[QuestionId, str]], *, okvqa_variant: str = "authors"
) -> Score:
    """Score (question id, text) pairs of `task` against `gold` in that benchmark's official annotation
    format.

    `okvqa_variant` is "authors" (the paper's) or "official" and concerns OK-VQA only. Raises UserError for an
    unknown task and for predictions that do not fit the gold answers one to one.
    """
    if task not in TASKS:
        raise UserError(f"no scorer for the task {task!r}")
    scorer = TASKS[task].scorer
    if scorer == "okvqa":
        return score_okvqa(gold, predictions, okvqa_variant)
    if scorer == "textvqa":
        return score_textvqa(gold, predictions)
    if scorer == "gqa":
        return score_gqa(gold, predictions)
    if scorer == "caption":
        return score_captions(gold, predictions)
    return score_exact(gold, predictions, task)
