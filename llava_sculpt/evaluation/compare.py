"""Evaluated models beside each other, question by question: what the others forgot and learned against the first."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.prepared import Task, load_tasks
from llava_sculpt.evaluation.results_file import Results
from llava_sculpt.evaluation.run import choose_target, summarise
from llava_sculpt.evaluation.score_files import read_predictions
from llava_sculpt.evaluation.scorers.scorer import QuestionId, Score
from llava_sculpt.names import DATA, TASK_NAME, in_order, task_label
from llava_sculpt.records import read_checked

KINDS = {"forgotten": "Forgotten", "learned": "Learned", "wrong": "Both wrong", "right": "Both right"}
DATA_ROOTS = (DATA["tiny"], DATA["paper"])
# Captions have no right and wrong. Forgotten or learned is a fall or rise of CIDEr by half and by this many points;
# of the others those are good whose mean over the two models reaches GOOD_CAPTION.
CLEAR_CIDER = 20.0
GOOD_CAPTION = 50.0
_VARIANTS = ("authors", "official")


@dataclass(frozen=True)
class Answer:
    """One model's answer to a question, its score on the paper's scale, and whether it is right (captions: None)."""

    text: str
    score: float
    right: bool | None


@dataclass(frozen=True)
class Item:
    """A question with the answers of all models.

    Attributes:
        image: the file of its picture; None for a question without one.
        gold: the gold answers, or reference captions, the most frequent first, with the number of times they occur.
        answers: by model, the reference first.
        kinds: a key of KINDS for every model but the first.
    """

    task: str
    question_id: QuestionId
    question: str
    image: Path | None
    gold: list[tuple[str, int]]
    answers: list[Answer]
    kinds: list[str]


@dataclass(frozen=True)
class Comparison:
    """Models on the questions that all of them answered.

    Attributes:
        labels: the models' names, each different; the first is the reference.
        rows: of `table.format_table`: (label, scores of the common tasks, Source, Target, Avg).
        target: the task that counts as Target, if there is one.
        items: every scored question, by task.
        captions: the tasks in which no answer is right or wrong.
        notes: what a reader must know beside the numbers.
    """

    labels: list[str]
    rows: list[tuple[str, dict[str, Any]]]
    tasks: list[str]
    target: str | None
    items: list[Item]
    captions: list[str]
    notes: list[str]

    def counts(self, model: int, task: str | None = None) -> dict[str, int]:
        """How many questions, of one task or all, are of each kind for a model (1: the first beside the reference)."""
        found = Counter(item.kinds[model - 1] for item in self.items if task in (None, item.task))
        return {kind: found[kind] for kind in KINDS}


def compare(folders: Sequence[Path], roots: Sequence[Path] = DATA_ROOTS) -> Comparison:
    """Compare evaluated models by their stored predictions, scored anew one by one.

    Args:
        folders: what `eval` or `finetune` wrote: results.json and predictions/; the first is the reference.
        roots: where the prepared data may be. The first place that has the questions which were scored is taken.

    Raises:
        UserError: fewer than two folders, one that is not evaluated, results of other questions or other settings than
            the first's, data not found, predictions that are missing, broken, or not those of results.json.
    """
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < max(2, len(places)):
        raise UserError("compare needs two or more folders, all different: the reference, then what is held beside it")
    found = _read_results(folders)
    names = _common_tasks(folders, found)
    tasks = _find_tasks(names, found[0], roots)
    labels = _labels(folders, found)
    scored = [_score(folder, results, tasks) for folder, results in zip(folders, found, strict=True)]
    targets = {results["target_task"] for results in found}
    target = targets.pop() if len(targets) == 1 else None
    target = target if target in names else choose_target(names, None)
    rows = []
    for label, results in zip(labels, found, strict=True):
        entries = {name: results["tasks"][name] for name in names}
        means = summarise({name: entry["score"] for name, entry in entries.items()}, target)
        rows.append((label, {"tasks": entries, **means}))
    items = [item for task in tasks for item in _items(task, [of_model[task.name] for of_model in scored])]
    captions = [task.name for task in tasks if task.scorer.right_from is None]
    return Comparison(labels, rows, names, target, items, captions, _notes(labels, found, names, scored))


def kind_of(before: float, after: float, right_from: float | None) -> str:
    """The key of KINDS for two scores of one question, the reference's first.

    Args:
        right_from: score from which an answer is right; None for captions.
    """
    if right_from is None:
        low, high = sorted((before, after))
        if low <= high / 2 and high - low >= CLEAR_CIDER:
            return "forgotten" if after < before else "learned"
        return "right" if (low + high) / 2 >= GOOD_CAPTION else "wrong"
    if before >= right_from:
        return "right" if after >= right_from else "forgotten"
    return "learned" if after >= right_from else "wrong"


def format_counts(comparison: Comparison) -> str:
    """A line per model and task: how many questions were forgotten, learned, and stayed wrong or right."""
    lines = []
    for model, label in enumerate(comparison.labels[1:], 1):
        lines.append(f"{label} against {comparison.labels[0]}, questions:")
        for task in [*comparison.tasks, None]:
            counts = comparison.counts(model, task)
            told = ", ".join(f"{KINDS[kind].lower()} {count:,}" for kind, count in counts.items())
            lines.append(f"  {task_label(task) if task else 'all'}: {told} (of {sum(counts.values()):,})")
    return "\n".join(lines)


def _read_results(folders: Sequence[Path]) -> list[Results]:
    found, problems = [], []
    for folder in folders:
        file = folder / "results.json"
        try:
            results = read_checked(file, Results, _not_evaluated(folder))
            known = [n for n in results["tasks"] if TASK_NAME.fullmatch(n) and n in results["settings"]["data"]]
            lost = [name for name in results["tasks"] if name not in known]
            problems += [f"{file}: tasks: {name!r} is no task, or settings.data does not have it" for name in lost]
            if not results["tasks"]:
                problems.append(f"{file}: tasks: none was scored")
            found.append(results)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return found


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))


def _not_evaluated(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: folder not found"
    if _is_model(folder):
        command = f"llava-sculpt eval --model {shlex.quote(str(folder))}"
        return f"{folder}: a model without results; run: {command}, and compare runs/eval/{folder.resolve().name}"
    return f"{folder}: no results.json; compare takes folders that `llava-sculpt eval` or `finetune` wrote"


def _common_tasks(folders: Sequence[Path], found: Sequence[Results]) -> list[str]:
    """The tasks that all have, if they were scored on the same questions in the same way."""
    names = in_order(name for name in found[0]["tasks"] if all(name in results["tasks"] for results in found))
    if not names:
        raise UserError(f"{', '.join(map(str, folders))}: no task was scored for all of them")
    problems = []
    for folder, results in zip(folders[1:], found[1:], strict=True):
        reasons = [f"{name} ({', '.join(other)})" for name in names if (other := _differences(name, found[0], results))]
        if reasons:
            problems.append(
                f"{folders[0]} and {folder} cannot stand together, scored differently: {'; '.join(reasons)}; "
                "evaluate both on the same data with the same flags of `llava-sculpt eval`"
            )
    if problems:
        raise UserError(problems)
    return names


def _differences(name: str, one: Results, other: Results) -> list[str]:
    """In what the scores of a task differ, apart from the model."""
    words = {"split": "split", "prompt_style": "prompts", "decoding": "decoding", "metric": "metric"}
    first, second = one["tasks"][name], other["tasks"][name]
    found = [] if one["settings"]["data"][name] == other["settings"]["data"][name] else ["questions"]
    found += [word for key, word in words.items() if first[key] != second[key]]  # type: ignore[literal-required]
    return found + ["scorer"] * (first["variant"] != second["variant"] and first["metric"] == second["metric"])


def _find_tasks(names: Sequence[str], results: Results, roots: Sequence[Path]) -> list[Task]:
    """The prepared data that was scored, known by its fingerprint."""
    split = results["tasks"][names[0]]["split"]
    obstacles = []
    for root in roots:
        try:
            tasks = load_tasks(names, root, split)
        except UserError as error:
            obstacles.append(error.problems[0])
            continue
        other = [task.name for task in tasks if task.fingerprint != results["settings"]["data"][task.name]]
        if not other:
            return tasks
        obstacles.append(f"{root}: other questions or answers of {', '.join(other)}")
    places = " or ".join(map(str, roots))
    raise UserError(
        f"the questions that were scored are not in {places}; name their folder with --data_root "
        f"({'; '.join(obstacles)})"
    )


def _labels(folders: Sequence[Path], found: Sequence[Results]) -> list[str]:
    labels = [results["model_id"] for results in found]
    return [
        label if labels.count(label) == 1 else f"{label} ({folder})"
        for label, folder in zip(labels, folders, strict=True)
    ]


def _score(folder: Path, results: Results, tasks: Sequence[Task]) -> dict[str, tuple[dict[QuestionId, str], Score]]:
    """By task: the stored answers, and their score."""
    scored, problems = {}, []
    for task in tasks:
        file = folder / "predictions" / f"{task.name}.jsonl"
        entry = results["tasks"][task.name]
        try:
            if not file.is_file():
                raise UserError(f"{file}: not found; run: {_eval_command(folder, results)}")
            pairs, gold = read_predictions(task.scorer, file, task.gold)
            try:
                variant = entry["variant"] if entry["variant"] in _VARIANTS else "authors"
                score = task.scorer.score(gold, pairs, variant, None)
            except UserError as error:
                raise UserError([f"{file}: {problem}" for problem in error.problems]) from error
            if score.metric == entry["metric"] and abs(score.score - entry["score"]) > 1e-6:
                raise UserError(
                    f"{file}: scores {score.score:.2f}, where results.json says {entry['score']:.2f}: not the answers "
                    f"that were scored; run: {_eval_command(folder, results)}"
                )
            scored[task.name] = dict(pairs), score
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return scored


def _eval_command(folder: Path, results: Results) -> str:
    """What writes the predictions of an evaluated folder again."""
    model = next((str(place) for place in (folder, Path(results["model_id"])) if _is_model(place)), "MODEL")
    tasks = ",".join(in_order(results["tasks"]))
    return f"llava-sculpt eval --model {shlex.quote(model)} --tasks {tasks} --output_dir {shlex.quote(str(folder))}"


def _items(task: Task, scored: Sequence[tuple[dict[QuestionId, str], Score]]) -> list[Item]:
    """The questions of a task that count in its score, in their order."""
    right_from = task.scorer.right_from
    items = []
    for question in task.questions:
        name = question["question_id"]
        if name not in scored[0][1].per_item:
            continue
        scores = [score.per_item[name] for _, score in scored]
        answers = [
            Answer(texts[name], value, None if right_from is None else value >= right_from)
            for (texts, _), value in zip(scored, scores, strict=True)
        ]
        gold = Counter(task.scorer.gold_texts(task.gold[name])).most_common()
        kinds = [kind_of(scores[0], after, right_from) for after in scores[1:]]
        image = task.image_folder / question["image"] if "image" in question else None
        items.append(Item(task.name, name, question["text"], image, gold, answers, kinds))
    return items


def _notes(
    labels: Sequence[str],
    found: Sequence[Results],
    names: Sequence[str],
    scored: Sequence[dict[str, tuple[dict[QuestionId, str], Score]]],
) -> list[str]:
    notes = [
        f"{label} is built on another base model than {labels[0]}: what it does not know it need not have forgotten."
        for label, results in zip(labels, found, strict=True)
        if results["base"] != found[0]["base"]
    ]
    left = in_order({name for results in found for name in results["tasks"]} - set(names))
    if left:
        notes.append(f"Left out, because not every model was scored on it: {', '.join(task_label(n) for n in left)}.")
    for name in names:
        stored, here = found[0]["tasks"][name]["metric"], scored[0][name][1].metric
        if stored != here:
            notes.append(f"{task_label(name)}: the table has {stored}; question by question it is {here}.")
    return notes
