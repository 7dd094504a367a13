"""What `results.json` of an evaluation holds, checked where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from llava_sculpt.records import read_checked

RESULTS_FILE = "results.json"
Finite = Annotated[float, Field(allow_inf_nan=False)]


class TaskResult(TypedDict):
    """A task's score on the paper's scale, and all that qualifies it; `binary` and `open` are GQA's."""

    score: Finite
    n: Annotated[int, Ge(1)]
    metric: str
    variant: str
    split: str
    prompt_style: str
    decoding: str
    binary: NotRequired[Finite]
    open: NotRequired[Finite]


class Settings(TypedDict):
    """What two evaluations must share to be compared; `data` are the fingerprints of questions and gold answers."""

    split: str
    max_new_tokens: int
    data: dict[str, str]
    prompt_styles: dict[str, str]
    scorers: dict[str, str]


class Inputs(TypedDict):
    """sha256 of what else decides the answers: model, tokenizer and preprocessor, and the images of each task."""

    model: str
    processing: str
    images: dict[str, str]


class Precision(TypedDict):
    """How answers were computed: dtype of the weights, whether none depends on the batch, an adapter in the weights."""

    dtype: str
    exact: bool
    merged: bool


class Results(TypedDict):
    """Content of results.json, see `evaluation.run.evaluate`.

    Files written before 0.2 have no `inputs` and no `precision`; they are of exact decoding, in float32 or bfloat16.
    """

    model_id: str
    base: str
    tasks: dict[str, TaskResult]
    source: Finite | None
    target: Finite | None
    target_task: str | None
    avg: Finite | None
    settings: Settings
    config_hash: str
    versions: dict[str, str]
    inputs: NotRequired[Inputs]
    precision: NotRequired[Precision]


def read_results_file(file: Path) -> Results:
    """The results in a file.

    Raises:
        UserError: missing, damaged, or no results.
    """
    return read_checked(file, Results)
