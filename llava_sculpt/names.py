"""The methods and the tasks, one row each: what the command line, training, grids, tables and figures call them.

Adding a baseline or a data set begins with a row here (CONTRIBUTING.md). `shipped` finds what the package brings along.
Imports nothing heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCALES = ("paper", "tiny")
LORASCULPT = "sculpt"
ZERO_SHOT = "zero_shot"
LORA = "lora"


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        label: its name in tables and figures, as in the paper.
        kind: `base` (the untouched model), `training` (LoRA trained in some way), `penalty` (LoRA trained with
            `methods/NAME.py`'s `NAME_penalty` in the loss) or `edit` (`artifacts/NAME.py`'s `NAME` changes a trained
            LoRA).
        fields: its settings beside those of plain LoRA, each with the numbers that it takes (see ranges.py).
        whole_weight: a penalty that reads the frozen W, so that it cannot run with W in pieces (ZeRO-3).
    """

    label: str
    kind: str
    fields: dict[str, tuple[type, str]] = field(default_factory=dict)
    whole_weight: bool = False


METHODS = {
    ZERO_SHOT: Method("Zero-shot", "base"),
    LORA: Method("LoRA", "training"),
    "dora": Method("DoRA", "training"),
    "l2": Method("L2-Reg", "penalty", {"reg_lambda": (float, "[0, inf)")}),
    "orth": Method("Orth-Reg", "penalty", {"reg_lambda": (float, "[0, inf)")}, whole_weight=True),
    "model_tailor": Method("Model Tailor", "edit", {"keep": (float, "(0, 1]"), "samples": (int, "[1, inf)")}),
    "dare": Method("DARE", "edit", {"drop": (float, "[0, 1)")}),
    "post_prune": Method("Post-pruning", "edit", {"density": (float, "(0, 1]")}),
    LORASCULPT: Method("LoRASculpt", "training"),
}
TRAINED = tuple(name for name, method in METHODS.items() if method.kind in ("training", "penalty"))
PENALTIES = tuple(name for name, method in METHODS.items() if method.kind == "penalty")
EDITS = tuple(name for name, method in METHODS.items() if method.kind == "edit")


@dataclass(frozen=True)
class TaskName:
    """A benchmark that models are trained on (Target), that shows what they forget (Source), or that is only scored.

    `tasks/NAME.py` prepares it from its official files. Every other name stands for a task of the user's own, a Target
    that `evaluation/own.py` prepares, with the scorer that its manifest names.

    Attributes:
        label: its name in tables and figures, as in the paper.
        role: `target` or `source`, which make the paper's average and have a tiny twin, or `extra`, scored when named.
        scorer: what scores its answers (`evaluation/scorers/`).
        tiny_options: of its preparation at the tiny scale.
    """

    label: str
    role: str
    scorer: str
    tiny_options: dict[str, Any] = field(default_factory=dict)


TASKS = {
    # The tiny model answers with words: a learnt letter does not train at its size, and OCR tokens in the prompt would
    # answer its TextVQA by themselves.
    "iconqa": TaskName("IconQA", "target", "exact", {"answer_style": "text"}),
    "coco": TaskName("COCO-Caption", "target", "cider"),
    "okvqa": TaskName("OKVQA", "source", "okvqa"),
    "ocrvqa": TaskName("OCRVQA", "source", "exact"),
    "gqa": TaskName("GQA", "source", "gqa"),
    "textvqa": TaskName("TextVQA", "source", "textvqa", {"ocr_tokens": False}),
}
TARGETS = tuple(name for name, task in TASKS.items() if task.role == "target")
SOURCES = tuple(name for name, task in TASKS.items() if task.role == "source")
PAPER_TASKS = (*TARGETS, *SOURCES)
METRICS = ("exact", "contains", "vqa", "choice", "cider")  # scorers that one's own task may have
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of one's own: a folder, a file and a word of a command
DATA = {"paper": Path("data"), "tiny": Path("data/tiny")}  # prepared data sets, each in a folder of its name
# Links to configs/ and data/tiny_llava in a checkout, their files in an installed package.
SHIPPED = Path(__file__).parent / "shipped"


def task_label(name: str) -> str:
    """The name of a task in tables and figures; one's own is called what its user calls it."""
    return TASKS[name].label if name in TASKS else name


def in_order(names: Iterable[str]) -> list[str]:
    """Tasks as they are shown: one's own, then the benchmarks in the order of `TASKS`."""
    return sorted(names, key=lambda name: list(TASKS).index(name) if name in TASKS else -1)


def is_target(name: str) -> bool:
    """Whether a model can be trained on a task, as far as its name tells: a Target of the paper, or one's own."""
    return name in TARGETS or (name not in TASKS and TASK_NAME.fullmatch(name) is not None)


def recipe_of(task: str) -> str:
    """The Target whose training settings a task has: its own, or for one's own task IconQA's."""
    return task if task in TARGETS else "iconqa"


def config_file(scale: str, task: str, method: str) -> Path:
    """The training YAML of a method, to be opened with `shipped`: LoRASculpt's own, plain LoRA's for every other."""
    method_file = "sculpt" if method == LORASCULPT else "lora"
    return Path("configs") / ("tiny" if scale == "tiny" else "") / f"{recipe_of(task)}_{method_file}.yaml"


def shipped(path: str | Path) -> str:
    """Where a file or folder is: the package's own, if it is in configs/ or data/tiny_llava and not here.

    Names as in the repository are what is recorded and shown. They are opened through this, and so mean the same in any
    working directory. Any other path stays as it is, there or not.
    """
    parts = Path(path).parts
    ours = (parts[:1] == ("configs",) or parts[:2] == ("data", "tiny_llava")) and ".." not in parts
    own = SHIPPED.joinpath(*parts)
    return str(own) if ours and not os.path.exists(path) and own.exists() else str(path)
