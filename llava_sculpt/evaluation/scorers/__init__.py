"""The scorers of the benchmarks, equal to the evaluators of the paper also in the corners."""

from llava_sculpt.evaluation.scorers.caption import Captions
from llava_sculpt.evaluation.scorers.exact import Exact
from llava_sculpt.evaluation.scorers.gqa import GQA
from llava_sculpt.evaluation.scorers.scorer import Scorer
from llava_sculpt.evaluation.scorers.vqa import OKVQA, TextVQA
from llava_sculpt.names import TASKS

SCORERS: dict[str, type[Scorer]] = {
    "exact": Exact,
    "okvqa": OKVQA,
    "textvqa": TextVQA,
    "gqa": GQA,
    "caption": Captions,
}


def scorer_of(task: str) -> Scorer:
    """The scorer of a data set."""
    return SCORERS[TASKS[task].scorer](task)
