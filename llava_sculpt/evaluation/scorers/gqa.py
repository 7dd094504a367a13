"""GQA accuracy over the balanced questions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llava_sculpt.evaluation.scorers.score import QuestionId, Score, match_predictions, mean


def score_gqa(gold: dict[str, dict[str, Any]], predictions: Iterable[tuple[QuestionId, str]]) -> Score:
    """Exact match on GQA, as LLaVA's conversion and the official evaluator do together.

    The prediction loses all trailing periods (not spaces) and is lower-cased; gold is compared as it is.
    `gold`: {question id: {"answer", "isBalanced", "types": {"structural"}}}. Unbalanced questions do not
    count, and predictions for them are dropped. `extra` holds the accuracy over "binary" and "open" ("query")
    questions where there are any. Raises UserError on missing, duplicate or unknown ids.
    """
    balanced = {qid: record for qid, record in gold.items() if record["isBalanced"]}
    texts = match_predictions(predictions, balanced, "gqa", ignored=gold.keys() - balanced.keys())
    per_item: dict[QuestionId, float] = {}
    by_type: dict[str, list[float]] = {"binary": [], "open": []}
    for qid, record in balanced.items():
        correct = texts[qid].rstrip(".").lower() == record["answer"]
        per_item[qid] = 100.0 * correct
        by_type["open" if record["types"]["structural"] == "query" else "binary"].append(100.0 * correct)
    extra = {kind: mean(values) for kind, values in by_type.items() if values}
    return Score(mean(per_item.values()), len(per_item), "accuracy", "exact match, balanced", per_item, extra)
