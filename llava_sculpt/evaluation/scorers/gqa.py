"""GQA accuracy over the balanced questions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llava_sculpt.evaluation.scorers.score import QuestionId, Score, match_predictions, mean


def score_gqa(
    gold: dict[str, dict[str, Any]], predictions: Iterable[tuple[QuestionId, str]], variant: str = "authors"
) -> Score:
    """Exact match on GQA.

    `variant` "authors": LLaVA's conversion and the official evaluator together, that is, the prediction loses all
    trailing periods (not spaces) and is lower-cased; "official": the evaluator alone, on the text as it is. Gold is
    always compared as it is.
    `gold`: {question id: {"answer", "isBalanced", "types": {"structural"}}}. Unbalanced questions do not
    count, and predictions for them are dropped. `extra` holds the accuracy over "binary" and "open" ("query")
    questions where there are any. Raises UserError on missing, duplicate or unknown ids.
    """
    balanced = {qid: record for qid, record in gold.items() if record["isBalanced"]}
    texts = match_predictions(predictions, balanced, "gqa", ignored=gold.keys() - balanced.keys())
    correct: dict[QuestionId, bool] = {}
    by_type: dict[str, list[bool]] = {"binary": [], "open": []}
    for qid, record in balanced.items():
        text = texts[qid].rstrip(".").lower() if variant == "authors" else texts[qid]
        correct[qid] = text == record["answer"]
        by_type["open" if record["types"]["structural"] == "query" else "binary"].append(correct[qid])
    extra = {kind: 100 * mean(values) for kind, values in by_type.items() if values}
    name = "exact match, balanced" if variant == "authors" else "exact match, balanced, predictions as they are"
    per_item = {qid: 100.0 * right for qid, right in correct.items()}
    return Score(100 * mean(correct.values()), len(correct), "accuracy", name, per_item, extra)
