"""GQA accuracy over the balanced questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sculpt.evaluation.scorers.scorer import Gold, Pairs, Score, Scorer, Seen, match_predictions, mean, percent
from llava_sculpt.tasks.common import load_json
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems
from llava_sculpt.tasks.stream import stream_records


class GQA(Scorer):
    """Exact match. Gold: {"answer", "isBalanced", "types": {"structural"}}, compared as it is.

    Variant `authors`: LLaVA's conversion and the official evaluator together, that is, the prediction loses all
    trailing periods (not spaces) and is lower-cased; `official`: the evaluator alone, on the text as it is. Unbalanced
    questions do not count, and predictions for them are dropped. `extra` holds the accuracy over "binary" and "open"
    ("query") questions where there are any.
    """

    fields = (("question_id", "text"), ("questionId", "prediction"))

    def read_gold(self, path: Path, problems: Problems, seen: Seen, answer_style: str) -> Gold:
        gold: Gold = {}
        for question_id, record in stream_records(path):
            where = f"question {question_id}"
            problems.identifier({"question id": question_id}, "question id", path, where, seen)
            answer = problems.value(record, "answer", str, path, where)
            balanced = problems.value(record, "isBalanced", bool, path, where)
            types = problems.value(record, "types", dict, path, where)
            structural = problems.value(types, "structural", str, path, where) if types is not None else None
            gold[question_id] = {"answer": answer, "isBalanced": balanced, "types": {"structural": structural}}
        return gold

    def read_questions(self, path: Path) -> list[tuple[str, dict[str, Any]]]:
        if path.suffix != ".json":
            return read_records(path)
        return [(f"question {name}", {"question_id": name}) for name in load_json(path, dict)]

    def gold_texts(self, answers: Any) -> list[str]:
        return [answers["answer"]]

    def lenient(self, gold: Gold, pairs: Pairs) -> tuple[Gold, Pairs]:
        """Of duplicates the last counts, unknown ids do not."""
        return gold, [(question_id, text) for question_id, text in dict(pairs).items() if question_id in gold]

    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        balanced = {question_id: record for question_id, record in gold.items() if record["isBalanced"]}
        texts = match_predictions(pairs, balanced, self.task, ignored=gold.keys() - balanced.keys())
        correct: dict[Any, float] = {}
        by_type: dict[str, list[float]] = {"binary": [], "open": []}
        for question_id, record in balanced.items():
            text = texts[question_id].rstrip(".").lower() if variant == "authors" else texts[question_id]
            correct[question_id] = float(text == record["answer"])
            kind = "open" if record["types"]["structural"] == "query" else "binary"
            by_type[kind].append(correct[question_id])
        extra = {kind: 100 * mean(values) for kind, values in by_type.items() if values}
        name = "exact match, balanced" + ("" if variant == "authors" else ", predictions as they are")
        return Score(100 * mean(correct.values()), len(correct), "accuracy", name, percent(correct), extra)
