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
    per_item: dict[QuestionId, float] = {}
    by_type: dict[str, list[float]] = {"binary": [], "open": []}
    for qid, record in balanced.items():
        text = texts[qid].rstrip(".").lower() if variant == "authors" else texts[qid]
        correct = text == record["answer"]
        per_item[qid] = 100.0 * correct
        by_type["open" if record["types"]["structural"] == "query" else "binary"].append(100.0 * correct)
    extra = {kind: mean(values) for kind, values in by_type.items() if values}
    name = "exact match, balanced" if variant == "authors" else "exact match, balanced, predictions as they are"
    return Score(mean(per_item.values()), len(per_item), "accuracy", name, per_item, extra)
