"""What every benchmark's scorer has: its official files read and checked, its odd ids, its score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from llava_sculpt.errors import UserError
from llava_sculpt.tasks.common import load_json, records_of
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.problems import Problems

QuestionId: TypeAlias = int | str
Gold: TypeAlias = dict[QuestionId, Any]  # by question id; what stands for the answers is the scorer's own
Pairs: TypeAlias = Sequence[tuple[QuestionId, str]]  # question id, text of the prediction
Seen: TypeAlias = set[QuestionId] | None  # ids so far; None where an id may come again


@dataclass(frozen=True)
class Score:
    """A benchmark's score on the paper's scale (percent; CIDEr x 100).

    `per_item` holds each question's own score on the same scale; `extra` holds further numbers of the
    benchmark (GQA: binary and open accuracy), also in percent.
    """

    score: float
    n: int
    metric: str
    variant: str
    per_item: dict[QuestionId, float]
    extra: dict[str, float] = field(default_factory=dict)


class Scorer(ABC):
    """One benchmark: how its files are read and its answers are compared. The methods here are what most have.

    Attributes:
        task: name of the data set, for messages.
        fields: (question id, text) in a prediction, in the order of preference.
        questions_key: where the official question file has its list of questions, if there is such a file.
        right_from: score of a question from which its answer counts as right; None where none is right or wrong.
    """

    right_from: float | None = 50.0
    questions_key: str | None = None
    fields: tuple[tuple[str, str], ...] = (("question_id", "text"), ("question_id", "answer"))

    def __init__(self, task: str) -> None:
        self.task = task

    @abstractmethod
    def read_gold(self, path: Path, problems: Problems, seen: Seen, answer_style: str) -> Gold:
        """Gold answers of the official annotation file, our `test_annotations.json`, or what the paper's authors use.

        What is wrong with a record goes to `problems`; of records with one id the last counts if `seen` is None.
        """

    def read_questions(self, path: Path) -> list[tuple[str, dict[str, Any]]]:
        """(place in the file, record) of every question of a question file: LLaVA's JSON lines, or the official .json.

        Raises:
            UserError: not such a file.
        """
        if path.suffix != ".json" or self.questions_key is None:
            return read_records(path)
        records = records_of(load_json(path, dict), self.questions_key, path)
        if not all(isinstance(record, dict) for record in records):
            raise UserError(f"{path}: every question should be an object")
        return [(f"question {n}", record) for n, record in enumerate(records)]

    def identify(
        self, gold: Gold, found: Sequence[tuple[str, QuestionId, Any]], path: Path, problems: Problems
    ) -> tuple[list[QuestionId], Gold]:
        """The questions meant by (place, id, prompt) of predictions or questions, and `gold` as compared with them."""
        return [question_id for _, question_id, _ in found], gold

    def gold_texts(self, answers: Any) -> list[str]:
        """The gold answers of one question as texts, from its value in `Gold`; one that several gave comes again."""
        return [answers]

    def gold_problem(self, answer: str) -> str | None:
        """Why a text cannot be a gold answer here; None if it can."""
        return None

    def lenient(self, gold: Gold, pairs: Pairs) -> tuple[Gold, Pairs]:
        """`gold` and predictions as the official script counts missing, duplicate and unknown ids.

        Here every line of the predictions is one item: duplicates count each (the k-th under the id `<id>#<k>`) and
        questions without a prediction do not count. What fails in the official script is left as it is, to be refused.
        """
        count: Counter[QuestionId] = Counter()
        items: Gold = {}
        renamed: list[tuple[QuestionId, str]] = []
        for question_id, text in pairs:
            count[question_id] += 1
            item = numbered(question_id, count[question_id])
            renamed.append((item, text))
            if question_id in gold:
                items[item] = gold[question_id]
        return items, renamed

    @abstractmethod
    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        """The official score.

        Args:
            variant: `authors` or `official`, where there are two evaluators.
            tokenizer: `ptb` or `python`, of captions; None takes `ptb` if it runs here.

        Raises:
            UserError: missing, duplicate or unknown ids.
        """


def numbered(question_id: QuestionId, number: int) -> QuestionId:
    """The id of the `number`-th record that has this id."""
    return question_id if number == 1 else f"{question_id}#{number}"


def match_predictions(
    predictions: Pairs, required: Collection[QuestionId], what: str, *, ignored: Collection[QuestionId] = ()
) -> dict[QuestionId, str]:
    """Prediction text by question id, with exactly one for every id in `required`.

    Predictions for ids in `ignored` are dropped. Missing, duplicate and unknown ids raise one UserError that
    names some of each: the official scripts let the last duplicate win or fail in the middle, which hides
    broken runs.
    """
    wanted, dropped = set(required), set(ignored)
    found: dict[QuestionId, str] = {}
    duplicate: list[QuestionId] = []
    unknown: list[QuestionId] = []
    for question_id, text in predictions:
        if question_id in found:
            duplicate.append(question_id)
        elif question_id in wanted:
            found[question_id] = text
        elif question_id not in dropped:
            unknown.append(question_id)
    missing = [question_id for question_id in required if question_id not in found]
    problems = [
        f"{what}: {len(ids)} {kind}: {', '.join(map(repr, ids[:5]))}{' ...' if len(ids) > 5 else ''}"
        for kind, ids in (
            ("questions without a prediction", missing),
            ("predictions for a question that already has one", duplicate),
            ("predictions for unknown question ids", unknown),
        )
        if ids
    ]
    if missing and unknown and {str(i) for i in missing} & {str(i) for i in unknown}:
        problems.append(f"{what}: some ids are numbers in one file and texts in the other; write them alike")
    if not wanted:
        problems.append(f"{what}: there are no gold answers to score against")
    if problems:
        raise UserError(problems)
    return found


def mean(values: Collection[float]) -> float:
    """Plain left-to-right mean, the official evaluators' order of summation."""
    return sum(values) / len(values)


def percent(accuracies: dict[QuestionId, float]) -> dict[QuestionId, float]:
    """Accuracies in percent, by question id."""
    return {question_id: 100 * accuracy for question_id, accuracy in accuracies.items()}
