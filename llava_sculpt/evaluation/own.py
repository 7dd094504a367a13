"""A task of one's own: LLaVA conversations and pictures -> the prepared folder that every benchmark has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llava_sculpt.data.conversation import last_question, question_problems, record_problems
from llava_sculpt.data.dataset import read_training_file
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers import scorer_of
from llava_sculpt.evaluation.scorers.scorer import QuestionId, numbered
from llava_sculpt.names import METRICS, TASK_NAME, TASKS
from llava_sculpt.tasks.common import Record
from llava_sculpt.tasks.lines import read_records
from llava_sculpt.tasks.preparation import Preparation
from llava_sculpt.tasks.problems import Problems

HOLDOUT = 0.1  # of the pictures, where no test file is given
_SHORT = 5  # words: gold answers of more, in the middle, are texts
_CAPTION = 3  # words from which CIDEr's n-grams say something
_SHOWN = 3


@dataclass(frozen=True)
class Asked:
    """A question with its gold answers; `rounds` were said before it."""

    question_id: QuestionId
    image: str | None
    rounds: list[tuple[str, str]]
    text: str
    gold: list[str]

    @property
    def line(self) -> Record:
        """The line of a question file."""
        line: Record = {"question_id": self.question_id}
        line |= {"image": self.image} if self.image is not None else {}
        line |= {"rounds": self.rounds} if self.rounds else {}
        return {**line, "text": self.text, "category": "default"}


def prepare_own(
    out: Path,
    train: Path | None,
    images: Path | None = None,
    *,
    test: Path | None = None,
    answers: Path | None = None,
    holdout: float | None = None,
    metric: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Prepare one's own data as the task `out.name`; returns the manifest.

    Args:
        train: LLaVA's training JSON; None for a task that is only scored.
        images: folder that the image paths start from; default: that of `train`, or else `test`.
        test: conversations as in `train`, whose last answer is the gold answer, or LLaVA's question file with an
            "answer" in its lines or in `answers`. Without it the records of some pictures are held out from `train`,
            drawn by content: no picture is on both sides. A record without a picture goes by itself.
        answers: gold answers for a question file: {"question_id", "answer": text or list of texts}.
        holdout: share of the pictures held out (default 0.1).
        metric: one of `names.METRICS`; by default exact match, where the gold answers are short. For `vqa` and `cider`
            the same question about the same picture may come again, each time with one more answer.

    Raises:
        UserError: everything wrong in the files, a metric that does not fit the gold answers, fewer than two test
            questions, a picture both in training and in test, a folder made from other data (without `overwrite`).
    """
    name, given = out.name, [path for path in (train, test, answers) if path is not None]
    wrong = [f"{path}: file not found" for path in given if not path.is_file()]
    if name in TASKS or not TASK_NAME.fullmatch(name):
        wrong.append(
            f"{name!r} cannot be the name of a task of your own (--name): letters, digits, _ . -, and no benchmark's"
        )
    if holdout is not None and test is not None:
        wrong.append("--holdout takes test questions from the training data, --test from a file: give one of them")
    if holdout is not None and not 0 < holdout < 1:
        wrong.append(f"--holdout: must be between 0 and 1, got {holdout}")
    if answers is not None and test is None:
        wrong.append("--answers: gold answers of a question file, which --test names")
    folder = images or (given[0].parent if given else Path())
    if not folder.is_dir():
        wrong.append(f"{folder}: no such folder (--images)")
    if wrong:
        raise UserError(wrong)
    share = None if test is not None else holdout or HOLDOUT
    job = Preparation(name, folder, out, {"holdout": share}, val_samples=0, overwrite=overwrite)
    job.sources = {k: p for k, p in (("train", train), ("test", test), ("answers", answers)) if p is not None}
    records = _conversations(train, folder, job.problems) if train is not None else []
    asked = _questions(test, answers, folder, job.problems) if test is not None else []
    hashes = job.problems.raise_with_images()
    if test is None:
        assert train is not None
        kept, held = _hold_out(records, [_content(r.get("image"), folder, hashes) for r in records], share or HOLDOUT)
        records, asked = kept, _of_conversations([(f"record {i + 1}", r) for i, r in held], train, job.problems)
        job.problems.raise_if_any()
    elif train is not None:
        trained = {_content(record.get("image"), folder, hashes): record.get("image") for record in records}
        _check_apart(trained, [(q.image, _content(q.image, folder, hashes)) for q in asked], train, test)
    if metric in ("vqa", "cider"):
        asked = _together(asked)
    if len(asked) < 2:
        advice = "add some" if test else "more pictures, a larger --holdout, or a file of them (--test)"
        raise UserError(f"{test or train}: {len(asked)} test questions, at least 2 are needed: {advice}")
    chosen = _fitting(metric, asked, test or train)
    job.samples = len(records)
    job.train = records if train is not None else None
    job.lines["test"] = [question.line for question in asked]
    job.gold["test"] = _gold(asked, chosen)
    return job.write("questions as given", "your own data", metric=chosen)


def _conversations(file: Path, images: Path, problems: Problems) -> list[Record]:
    """The records of a training file. What is wrong with them, or an image that is missing, is noted."""
    records = read_training_file(file)
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        found = record_problems(record)
        for problem in found:
            problems.add(file, where, problem)
        if not found and "image" in record:
            problems.image(images, [record["image"]], file, where)
    return records


def _questions(file: Path, answers: Path | None, images: Path, problems: Problems) -> list[Asked]:
    """The test questions of a file of conversations or of a question file, with their gold answers."""
    records = read_records(file)
    if all("conversations" in record for _, record in records):
        if answers is not None:
            problems.add(answers, "", f"{file} holds conversations, which have their gold answers in them")
        _conversations(file, images, problems)
        return [] if len(problems) else _of_conversations(records, file, problems)
    gold = _answers(answers, problems) if answers is not None else {}
    seen: set[QuestionId] = set()
    asked = []
    for where, record in records:
        question_id = problems.identifier(
            record, "id" if "question_id" not in record else "question_id", file, where, seen
        )
        text = problems.question(record, "text", file, where)
        image = problems.value(record, "image", str, file, where) if "image" in record else None
        if image is not None:
            problems.image(images, [image], file, where)
        for problem in question_problems(text) if text is not None else []:
            problems.add(file, where, problem)
        own = _texts(record, "answer", file, where, problems) if answers is None else gold.pop(question_id, None)
        if question_id is None or text is None:
            continue
        if own is None:
            if answers is not None:
                problems.add(answers, "", f"no answer to question {question_id!r} of {file}")
            continue
        asked.append(Asked(question_id, image, [], text, own))
    for question_id in list(gold)[:_SHOWN]:
        problems.add(file, "", f"does not ask question {question_id!r}, which {answers} answers")
    return asked


def _answers(file: Path, problems: Problems) -> dict[QuestionId | None, list[str]]:
    found: dict[QuestionId | None, list[str]] = {}
    seen: set[QuestionId] = set()
    for where, record in read_records(file):
        question_id = problems.identifier(
            record, "id" if "question_id" not in record else "question_id", file, where, seen
        )
        texts = _texts(record, "answer", file, where, problems)
        if question_id is not None and texts is not None:
            found[question_id] = texts
    return found


def _texts(record: Record, key: str, file: Path, where: str, problems: Problems) -> list[str] | None:
    """One text, or a list of them."""
    if isinstance(record.get(key), list):
        return problems.texts(record, key, file, where)
    text = problems.value(record, key, str, file, where)
    return None if text is None else [text]


def _of_conversations(records: Sequence[tuple[str, Record]], file: Path, problems: Problems) -> list[Asked]:
    """The last question of every sound record. Ids that come again are numbered."""
    asked, count = [], dict[QuestionId, int]()
    for place, (where, record) in enumerate(records, 1):
        given = record.get("id")
        name = given if isinstance(given, (int, str)) and not isinstance(given, bool) and str(given).strip() else place
        count[name] = count.get(name, 0) + 1
        try:
            rounds, text, answer = last_question(record)
        except UserError as error:
            problems.add(file, where, error.problems[0])
            continue
        asked.append(Asked(numbered(name, count[name]), record.get("image"), rounds, text, [answer]))
    return asked


def _content(image: str | None, folder: Path, hashes: dict[Path, str]) -> str | None:
    """sha256 of a picture's file."""
    return None if image is None else hashes[folder / image]


def _hold_out(
    records: Sequence[Record], contents: Sequence[str | None], share: float
) -> tuple[list[Record], list[tuple[int, Record]]]:
    """The records to train on, and those of the pictures held out, with their places; a seeded draw of contents."""
    groups = [content or f"record {i}" for i, content in enumerate(contents)]
    names = list(dict.fromkeys(groups))
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = {names[i] for i in random.Random("holdout").sample(range(len(names)), count)}
    kept = [record for record, group in zip(records, groups, strict=True) if group not in chosen]
    held = [(i, record) for i, (record, group) in enumerate(zip(records, groups, strict=True)) if group in chosen]
    return kept, held


def _check_apart(
    trained: dict[str | None, Any], asked: Sequence[tuple[str | None, str | None]], train: Path, test: Path
) -> None:
    """Refuse a picture that is trained on and asked about, whatever its files are called."""
    same = {image: trained[content] for image, content in asked if image is not None and content in trained}
    if same:
        shown = [str(one) if one == other else f"{one} (= {other})" for one, other in same.items()][:_SHOWN]
        raise UserError(
            f"{test}: {len(same)} of its pictures are in {train} too, so the score would not be one of new pictures: "
            f"{', '.join(shown)}{' ...' if len(same) > _SHOWN else ''}; take them out of one of the files, or leave "
            "--test out (--holdout)"
        )


def _fitting(metric: str | None, asked: Sequence[Asked], file: Path | None) -> str:
    """The metric, or exact match by default; refused where it cannot judge answers like the gold ones."""
    words = median(len(text.split()) for question in asked for text in question.gold)
    if metric is None:
        if words > _SHORT:
            raise UserError(
                f"{file}: the gold answers are texts ({words:g} words in the middle), which nothing answers word for "
                "word: say how to score them with --metric cider (captions), contains, or exact"
            )
        return "exact"
    if metric not in METRICS:
        raise UserError(f"--metric {metric}: not one of {', '.join(METRICS)}")
    if metric == "cider" and words < _CAPTION:
        raise UserError(
            f"{file}: --metric cider compares texts, the gold answers have {words:g} words in the middle: take exact"
        )
    scorer = scorer_of("", metric)
    problems = Problems()
    for question in asked:
        for text in question.gold:
            if problem := scorer.gold_problem(text):
                problems.add(
                    Path(str(file)),
                    f"question {question.question_id!r}",
                    f"the gold answer {text!r:.60} {problem}, as --metric {metric} needs",
                )
    if metric not in ("vqa", "cider") and (many := [q.question_id for q in asked if len(q.gold) > 1]):
        problems.add(
            Path(str(file)),
            f"question {many[0]!r}",
            f"has several gold answers; --metric {metric} takes one, vqa and cider more",
        )
    problems.raise_if_any()
    return metric


def _together(asked: Sequence[Asked]) -> list[Asked]:
    """Questions that are the same but for the answer, as one with all answers."""
    found: dict[Any, Asked] = {}
    for question in asked:
        key = (question.image, tuple(question.rounds), question.text)
        if key in found:
            found[key].gold.extend(question.gold)
        else:
            found[key] = question
    return list(found.values())


def _gold(asked: Sequence[Asked], metric: str) -> Any:
    """The gold answers in the format that the metric's scorer reads."""
    if metric == "cider":
        references = [{"image_id": q.question_id, "caption": text} for q in asked for text in q.gold]
        return {"images": [{"id": q.question_id} for q in asked], "annotations": references}
    if metric == "vqa":
        return [{"question_id": q.question_id, "answers": q.gold} for q in asked]
    return [{"question_id": q.question_id, "answer": q.gold[0]} for q in asked]
