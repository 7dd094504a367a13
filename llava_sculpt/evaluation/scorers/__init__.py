"""The scorers of the benchmarks, equal to the evaluators of the paper also in the corners, and of one's own tasks."""

from llava_sculpt.evaluation.scorers.caption import Captions
from llava_sculpt.evaluation.scorers.exact import Exact
from llava_sculpt.evaluation.scorers.general import VQA, Choice, Contains
from llava_sculpt.evaluation.scorers.gqa import GQA
from llava_sculpt.evaluation.scorers.scorer import Scorer
from llava_sculpt.evaluation.scorers.vqa import OKVQA, TextVQA
from llava_sculpt.names import TASKS

SCORERS: dict[str, type[Scorer]] = {
    "exact": Exact,
    "okvqa": OKVQA,
    "textvqa": TextVQA,
    "gqa": GQA,
    "cider": Captions,
    "contains": Contains,
    "vqa": VQA,
    "choice": Choice,
}


def scorer_of(task: str, metric: str | None = None) -> Scorer:
    """The scorer of a benchmark; of one's own task that of its `metric` (`names.METRICS`)."""
    return SCORERS[metric or TASKS[task].scorer](task)
