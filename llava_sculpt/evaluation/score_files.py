"""`llava-sculpt score`: predictions and annotations in the official formats -> the official score."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers import scorer_of
from llava_sculpt.evaluation.scorers.caption import ptb_obstacle
from llava_sculpt.evaluation.scorers.scorer import Gold, Pairs, QuestionId, Scorer
from llava_sculpt.records import write_atomically
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems, is_text


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
    what the official script does (`Scorer.lenient`; of annotations with one id the last counts). `tokenizer` "ptb" or
    "python" is for captions.
    """
    if benchmark == "coco" and tokenizer == "ptb" and (obstacle := ptb_obstacle()):
        raise UserError(
            f"CIDEr needs Java (8 or newer, on the PATH) and pycocoevalcap: {obstacle}. "
            "Install them, or pass --tokenizer python for a score of another name, 'CIDEr (not PTB)'."
        )
    scorer = scorer_of(benchmark)
    gold = read_gold(scorer, annotations, answer_style, lenient=lenient)
    if questions is not None:
        asked = _read_question_ids(scorer, questions, gold)
        gold = {question_id: answers for question_id, answers in gold.items() if question_id in asked}
    pairs, gold = read_predictions(scorer, predictions, gold)
    if lenient:
        gold, pairs = scorer.lenient(gold, pairs)
    score = scorer.score(gold, pairs, variant, tokenizer)
    if per_item is not None:
        texts = dict(pairs)
        lines = [
            json.dumps({"question_id": item, "score": value, "prediction": texts[item]}) + "\n"
            for item, value in score.per_item.items()
        ]
        try:
            per_item.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(per_item, "".join(lines).encode())
        except OSError as error:
            raise UserError(f"{per_item}: cannot write the scores of the items: {error}") from error
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


def read_gold(scorer: Scorer, path: Path, answer_style: str = "letter", *, lenient: bool = False) -> Gold:
    """The gold answers of a data set by question id, from its official file or our `test_annotations.json`.

    Args:
        answer_style: what an answer to IconQA's own problems.json looks like (`tasks.iconqa.prepare`).
        lenient: of records with one id the last counts.

    Raises:
        UserError: every malformed record, and every id that comes again.
    """
    problems = Problems()
    if not path.is_file():
        raise UserError(f"{path}: file not found (annotations of {scorer.task})")
    gold = scorer.read_gold(path, problems, None if lenient else set(), answer_style)
    problems.raise_if_any()
    return gold


def read_predictions(scorer: Scorer, path: Path, gold: Gold) -> tuple[Pairs, Gold]:
    """(question id, text) of every prediction in JSON lines or one list, and `gold` as compared with them.

    Raises one UserError with all malformed records.
    """
    problems = Problems()
    found: list[tuple[str, QuestionId, Any]] = []
    texts: list[str] = []
    for where, record in read_records(path):
        id_key, text_key = next((f for f in scorer.fields if f[0] in record and f[1] in record), ("", ""))
        if not id_key:
            wanted = " or ".join(f"{a!r} and {b!r}" for a, b in scorer.fields)
            problems.add(path, where, f"needs the fields {wanted}")
            continue
        question_id = problems.identifier(record, id_key, path, where)
        text = record[text_key]
        if not isinstance(text, str):
            problems.add(path, where, f"field {text_key!r} should be str, found {type(text).__name__}")
        elif not is_text(text):
            problems.add(path, where, f"field {text_key!r} holds half of a surrogate pair, which is not text")
        elif question_id is not None:
            found.append((where, question_id, record.get("prompt")))
            texts.append(text)
    ids, gold = scorer.identify(gold, found, path, problems)
    problems.raise_if_any()
    return list(zip(ids, texts, strict=True)), gold


def _read_question_ids(scorer: Scorer, path: Path, gold: Gold) -> set[QuestionId]:
    """The ids asked by a question file: JSON lines of LLaVA (`question_id` or `id`), or the official file.

    Raises one UserError with all malformed records, every question without gold answers and repeated ones.
    """
    problems = Problems()
    found: list[tuple[str, QuestionId, Any]] = []
    for where, record in scorer.read_questions(path):
        question_id = problems.identifier(record, "id" if "question_id" not in record else "question_id", path, where)
        if question_id is not None:
            found.append((where, question_id, record.get("text")))
    ids, _ = scorer.identify(gold, found, path, problems)
    for (where, _, _), question_id in zip(found, ids, strict=True):
        if question_id not in gold:
            problems.add(path, where, f"question {question_id!r} is not among the annotations")
    twice = [question_id for question_id, count in Counter(ids).items() if count > 1]
    if twice:
        problems.add(path, "", f"{len(twice)} question ids occur more than once, the first: {twice[0]!r}")
    problems.raise_if_any()
    return set(ids)
