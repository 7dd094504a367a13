"""Exact match without regard to case: OCR-VQA, IconQA, and any data set whose gold answers are lines."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers.scorer import Gold, Pairs, Score, Scorer, Seen, match_predictions, percent
from llava_sculpt.names import TASKS
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems


class Exact(Scorer):
    """`prediction.lower() == answer.lower()`: no stripping, no punctuation removal. Gold: the answer."""

    def read_gold(self, path: Path, problems: Problems, seen: Seen, answer_style: str) -> Gold:
        """A list or JSON lines of {"question_id", "answer"}, which the authors' question files are as well.

        Of a benchmark a file that is one JSON object goes to `read_answers` of `tasks/NAME.py`, where there is one.
        """
        if self.task in TASKS and _holds_object(path):
            read_official = getattr(import_module(f"llava_sculpt.tasks.{self.task}"), "read_answers", None)
            if read_official is not None:
                gold: Gold = read_official(path, problems, answer_style)
                return gold
        gold = {}
        for where, record in read_records(path):
            question_id = problems.identifier(record, "question_id", path, where, seen)
            answer = problems.value(record, "answer", str, path, where)
            if question_id is not None and answer is not None:
                gold[question_id] = answer
        return gold

    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        texts = match_predictions(pairs, gold, self.task)
        correct = {question_id: float(texts[question_id].lower() == gold[question_id].lower()) for question_id in gold}
        score = 100 * sum(correct.values()) / len(correct)
        return Score(score, len(correct), "accuracy", "exact match, case-insensitive", percent(correct))


def _holds_object(path: Path) -> bool:
    """Whether a file is one JSON object with an object in it (an official file), not a list or JSON lines."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            head = stream.read(1 << 16).split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    text = "".join(head)
    return text.startswith("{") and text.partition(":")[2].startswith("{")
