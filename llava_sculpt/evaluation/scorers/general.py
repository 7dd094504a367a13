"""Metrics that one's own task may have beside exact match and CIDEr. Gold answers are those of `Exact`."""

from __future__ import annotations

import re
from pathlib import Path

from llava_sculpt.evaluation.scorers.answer_text import flatten, normalise
from llava_sculpt.evaluation.scorers.exact import Exact
from llava_sculpt.evaluation.scorers.scorer import (
    Gold,
    Pairs,
    QuestionId,
    Score,
    Scorer,
    Seen,
    match_predictions,
    mean,
    percent,
)
from llava_sculpt.evaluation.scorers.vqa import leave_one_out
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems

_WORD = re.compile(r"\w+")
# An option's letter, alone or in front of its text: B, (B), B., B) the text, B: the text.
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s|$)|(?=\s*$))")
# ... or said in a sentence: "The answer is B.", "Answer: (B)", "option B".
_SAID = re.compile(r"\b(?i:answer(?:\s+is)?|option|choice)\s*:?\s*\(?([A-Z])(?![A-Za-z'])")


class Contains(Exact):
    """The words of the gold answer stand in the prediction, next to each other; case and signs do not count."""

    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        texts = match_predictions(pairs, gold, self.task)
        correct = {name: float(f" {_words(answer)} " in f" {_words(texts[name])} ") for name, answer in gold.items()}
        return _accuracy(correct, "gold answer's words in the prediction")

    def gold_problem(self, answer: str) -> str | None:
        return None if _words(answer) else "holds no word to be found in an answer"


class Choice(Exact):
    """The letter of a multiple choice: alone, before the option's text, or said ("The answer is B."); else wrong."""

    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        texts = match_predictions(pairs, gold, self.task)
        correct = {name: float(chosen_letter(texts[name]) == chosen_letter(gold[name])) for name in gold}
        return _accuracy(correct, "letter of the choice")

    def gold_problem(self, answer: str) -> str | None:
        return None if chosen_letter(answer) else "is not the letter of a choice (A, B, ...)"


class VQA(Scorer):
    """VQA accuracy, both sides normalised as the VQA evaluators do. Gold: the answers of the annotators.

    From four answers on the mean over annotators of min(1, matches among the others / 3), as in the benchmarks with
    ten; with fewer an answer that one of them gave is right.
    """

    def read_gold(self, path: Path, problems: Problems, seen: Seen, answer_style: str) -> Gold:
        """A list or JSON lines of {"question_id", "answers": [text, ...]}."""
        gold: Gold = {}
        for where, record in read_records(path):
            question_id = problems.identifier(record, "question_id", path, where, seen)
            answers = problems.texts(record, "answers", path, where)
            if question_id is not None and answers is not None:
                gold[question_id] = answers
        return gold

    def gold_texts(self, answers: list[str]) -> list[str]:
        return list(answers)

    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        texts = match_predictions(pairs, gold, self.task)
        accuracies = {}
        for name, given in gold.items():
            answers, text = [normalise(flatten(answer)) for answer in given], normalise(flatten(texts[name]))
            many = len(answers) > 3
            accuracies[name] = leave_one_out(text, list(enumerate(answers))) if many else float(text in answers)
        score = 100 * mean(accuracies.values())
        return Score(score, len(accuracies), "VQA accuracy", "both sides normalised", percent(accuracies))


def chosen_letter(text: str) -> str | None:
    """The letter of the option that a text chooses, in upper case; None if it chooses none."""
    found = _LETTER.match(text.strip()) or _SAID.search(text)
    return found.group(1).upper() if found else None


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _accuracy(correct: dict[QuestionId, float], name: str) -> Score:
    return Score(100 * mean(correct.values()), len(correct), "accuracy", name, percent(correct))
