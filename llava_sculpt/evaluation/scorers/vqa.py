"""VQA accuracy against ten human answers: OK-VQA (two official variants) and TextVQA (m4c processing)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_sculpt.evaluation.scorers.answer_text import drop_punctuation, flatten, normalise
from llava_sculpt.evaluation.scorers.scorer import (
    Gold,
    Pairs,
    QuestionId,
    Score,
    Scorer,
    Seen,
    match_predictions,
    mean,
    numbered,
    percent,
)
from llava_sculpt.tasks.common import load_json, records_of
from llava_sculpt.tasks.problems import Problems


class OKVQA(Scorer):
    """VQA accuracy. Gold: [{"answer", ...}] of the annotators; it is not changed.

    Variant `authors`: the evaluator of 2016 that LLaVA's forks and the paper use; `official`: that of 2021. They differ
    in which side is normalised, see `_authors` and `_official`.
    """

    questions_key = "questions"

    def read_gold(self, path: Path, problems: Problems, seen: Seen, answer_style: str) -> Gold:
        """VQA format: {"annotations": [{"question_id", "answers": [{"answer", ...}]}]}.

        The official script goes through the annotations one by one, each with the answers of the last one of its id:
        where ids may come again, the k-th is under the id `<id>#<k>`.
        """
        last: Gold = {}
        count: Counter[QuestionId] = Counter()
        for number, record in enumerate(records_of(load_json(path, dict), "annotations", path)):
            where = f"annotation {number}"
            question_id = problems.identifier(record, "question_id", path, where, seen)
            answers = problems.value(record, "answers", list, path, where)
            if answers is not None and not answers:
                problems.add(path, where, "no answers")
            # An annotator may have typed nothing, so the text may be empty; it must be there.
            elif any(not isinstance(a, dict) or not isinstance(a.get("answer"), str) for a in answers or ()):
                problems.add(path, where, "every answer needs a text under 'answer'")
            elif question_id is not None:
                last[question_id] = answers
                count[question_id] += 1
        return {numbered(name, k): last[name] for name in last for k in range(1, count[name] + 1)}

    def gold_texts(self, answers: Any) -> list[str]:
        return [record["answer"] for record in answers]

    def lenient(self, gold: Gold, pairs: Pairs) -> tuple[Gold, Pairs]:
        """Of duplicate predictions the last counts, for each of its question's annotations."""
        answered = dict(pairs)
        again = {}
        for question_id, text in answered.items():
            number = 2
            while (item := numbered(question_id, number)) in gold:
                again[item] = text
                number += 1
        return gold, list({**again, **answered}.items())

    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        texts = match_predictions(pairs, gold, self.task)
        compare = _authors if variant == "authors" else _official
        accuracies = {name: leave_one_out(*compare(texts[name], answers)) for name, answers in gold.items()}
        score = 100 * sum(accuracies.values()) / len(accuracies)
        return Score(score, len(accuracies), "VQA accuracy", variant, percent(accuracies))


class TextVQA(Scorer):
    """VQA accuracy with the m4c evaluator's processing of both sides. Gold: the official record of the question."""

    questions_key = "data"

    def read_gold(self, path: Path, problems: Problems, seen: Seen, answer_style: str) -> Gold:
        """{"data": [{"question_id", "answers": [10 texts]}]}, in the official file with "image_id" and "question"."""
        gold: Gold = {}
        for number, record in enumerate(records_of(load_json(path, dict), "data", path)):
            where = f"record {number}"
            question_id = problems.identifier(record, "question_id", path, where, seen)
            for key in ("image_id", "question"):
                if isinstance(record, dict) and key in record:
                    problems.value(record, key, str, path, where)
            answers = problems.value(record, "answers", list, path, where)
            if answers is not None and (len(answers) != 10 or not all(isinstance(a, str) for a in answers)):
                problems.add(path, where, "needs exactly 10 answers, all text")
            if question_id is not None:
                gold[question_id] = record
        return gold

    def gold_texts(self, answers: Any) -> list[str]:
        return list(answers["answers"])

    def identify(
        self, gold: Gold, found: Sequence[tuple[str, QuestionId, Any]], path: Path, problems: Problems
    ) -> tuple[list[QuestionId], Gold]:
        """LLaVA's question files have the image id as question id; the question, in lower case, distinguishes them.

        LLaVA's evaluator compares all questions with the same image and text with the last of them: so does the
        returned gold, and their ids are given out one after the other.
        """
        alike: dict[tuple[str, str], list[QuestionId]] = {}
        for name, record in gold.items():
            # (An annotation file of another make may have question ids and answers only.)
            if "image_id" in record and "question" in record:
                alike.setdefault((record["image_id"], record["question"].lower()), []).append(name)
        images = {image_id for image_id, _ in alike}
        given: Counter[tuple[str, str]] = Counter()
        meant: list[QuestionId] = []
        for where, name, prompt in found:
            question = _question_of(prompt) if name in images else None
            if name in images and question is None:
                problems.add(path, where, "the question id is an image id, but 'prompt' holds no question")
            elif question is not None:
                key = (str(name), question)
                given[key] += 1
                name = alike[key][min(given[key], len(alike[key])) - 1] if key in alike else f"{name}: {question}"
            meant.append(name)
        last = {name: gold[names[-1]]["answers"] for key, names in alike.items() if given[key] for name in names}
        return meant, {name: {**record, "answers": last.get(name, record["answers"])} for name, record in gold.items()}

    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        texts = match_predictions(pairs, gold, self.task)
        accuracies = {
            name: leave_one_out(_m4c(texts[name]), list(enumerate(map(_m4c, record["answers"]))))
            for name, record in gold.items()
        }
        return Score(100 * mean(accuracies.values()), len(accuracies), "VQA accuracy", "m4c", percent(accuracies))


def _question_of(prompt: Any) -> str | None:
    """The question in a prompt of LLaVA's TextVQA evaluation, in lower case; None where its evaluator fails."""
    if not isinstance(prompt, str):
        return None
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found.group(1).lower() if found else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def leave_one_out(prediction: str, answers: Sequence[tuple[Any, str]]) -> float:
    """Mean over annotators of min(1, matches among the other annotators / 3): 1/2/3/4 of 10 -> 0.3/0.6/0.9/1.

    `answers` are (annotator, answer) pairs. "The others" are the pairs that differ from the one left out, so
    that two identical annotation records count as one annotator, as in the official code.
    """
    accuracies = []
    for left_out in answers:
        matches = sum(other != left_out and other[1] == prediction for other in answers)
        accuracies.append(min(1, matches / 3))
    return mean(accuracies)


def _authors(prediction: str, answers: list[dict[str, Any]]) -> tuple[str, list[tuple[Any, str]]]:
    """The prediction is always normalised; gold loses only its punctuation, and only if not unanimous.

    A gold "two" or "Fire truck" can therefore never be matched.
    """
    texts = [record["answer"] for record in answers]
    if len(set(texts)) > 1:
        texts = [drop_punctuation(text) for text in texts]
    return normalise(flatten(prediction)), _with_annotator(answers, texts)


def _official(prediction: str, answers: list[dict[str, Any]]) -> tuple[str, list[tuple[Any, str]]]:
    """Both sides are normalised if gold is not unanimous, otherwise neither is."""
    texts = [flatten(record["answer"]) for record in answers]
    prediction = flatten(prediction)
    if len(set(texts)) > 1:
        texts = [normalise(text) for text in texts]
        prediction = normalise(prediction)
    return prediction, _with_annotator(answers, texts)


def _with_annotator(answers: list[dict[str, Any]], texts: list[str]) -> list[tuple[Any, str]]:
    others = [{key: value for key, value in record.items() if key != "answer"} for record in answers]
    return list(zip(others, texts, strict=True))


def _m4c(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(flatten(text))
