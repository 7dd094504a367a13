"""`llava-sculpt score`: predictions and annotations in the official formats -> the official score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers.caption import ptb_obstacle, score_captions
from llava_sculpt.evaluation.scorers.exact import score_exact
from llava_sculpt.evaluation.scorers.gold import read_gold
from llava_sculpt.evaluation.scorers.gqa import score_gqa
from llava_sculpt.evaluation.scorers.predictions import (
    Pairs,
    as_the_official_script,
    only,
    read_predictions,
    read_question_ids,
)
from llava_sculpt.evaluation.scorers.score import Score
from llava_sculpt.evaluation.scorers.vqa import score_okvqa, score_textvqa
from llava_sculpt.records import write_atomically


def score_files(
    benchmark: str,
    predictions: Path,
    annotations: Path,
    *,
    questions: Path | None = None,
    variant: str = "authors",
    lenient: bool = False,
    per_item: Path | None = None,
    answer_style: str = "letter",
    tokenizer: str = "ptb",
) -> dict[str, Any]:
    """Score a file of predictions; returns {"benchmark", "variant", "score", "n", "metric", ...}.

    The score is on the paper's scale (percent; CIDEr x 100). `questions` restricts the annotations to the questions
    asked. `variant` "authors" or "official" tells the two evaluators of OK-VQA apart and, for GQA, whether
    predictions go through LLaVA's conversion; the other benchmarks have one evaluator. `per_item` gets JSON lines
    {"question_id", "score", "prediction"}. Missing, duplicate and unknown ids raise UserError, or with `lenient` do
    what the official script does (`as_the_official_script`). `tokenizer` "ptb" or "python" is for captions.
    """
    if benchmark == "coco" and tokenizer == "ptb" and (obstacle := ptb_obstacle()):
        raise UserError(
            f"CIDEr needs Java (8 or newer, on the PATH) and pycocoevalcap: {obstacle}. "
            "Install them, or pass --tokenizer python for a score of another name, 'CIDEr (not PTB)'."
        )
    gold = read_gold(benchmark, annotations, answer_style)
    if questions is not None:
        gold = only(benchmark, gold, set(read_question_ids(benchmark, questions, gold)))
    pairs, gold = read_predictions(benchmark, predictions, gold)
    if lenient:
        gold, pairs = as_the_official_script(benchmark, gold, pairs)
    score = _score(benchmark, gold, pairs, variant, tokenizer)
    if per_item is not None:
        _write_per_item(per_item, score, dict(pairs))
    return {
        "benchmark": benchmark,
        "variant": score.variant,
        "score": score.score,
        "n": score.n,
        "metric": score.metric,
        **score.extra,
        "lenient": lenient,
        "predictions": str(predictions),
        "annotations": str(annotations),
        "questions": str(questions) if questions is not None else None,
    }


def format_score(result: dict[str, Any]) -> str:
    """One line for people: the number and all that qualifies it."""
    extra = "".join(f", {kind} {result[kind]:.2f}" for kind in ("binary", "open") if kind in result)
    lenient = "; lenient about ids" if result["lenient"] else ""
    return (
        f"{result['benchmark']}: {result['metric']} {result['score']:.2f}{extra} "
        f"(n = {result['n']:,}; {result['variant']}{lenient})"
    )


def _score(benchmark: str, gold: Any, pairs: Pairs, variant: str, tokenizer: str) -> Score:
    if benchmark == "okvqa":
        return score_okvqa(gold, pairs, variant)
    if benchmark == "textvqa":
        return score_textvqa(gold, pairs)
    if benchmark == "gqa":
        return score_gqa(gold, pairs, variant)
    if benchmark == "coco":
        return score_captions(gold, pairs, tokenizer)
    return score_exact(gold, pairs, benchmark)


def _write_per_item(path: Path, score: Score, texts: dict[Any, str]) -> None:
    lines = [
        json.dumps({"question_id": item, "score": value, "prediction": texts[item]}) + "\n"
        for item, value in score.per_item.items()
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(lines).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot write the scores of the items: {error}") from error
