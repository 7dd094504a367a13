"""What a report holds, and its pages: Markdown beside the figures' files, and one HTML page that needs nothing else.

The pages are the templates `report.md` and `report.html` beside this module.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from llava_sculpt.experiments import figures
from llava_sculpt.experiments.claims import APPEARS, CONTRARY, MISSING, NOT_SHOWN, TARGET_MARGIN, Claim
from llava_sculpt.experiments.summary import Choice
from llava_sculpt.experiments.tables import COLUMN_NAMES, Table
from llava_sculpt.names import TASKS

PAGES = ("report.md", "report.html")
_SCALES = {
    "tiny": "a 2-million-parameter LLaVA on generated pictures (docs/tiny.md), the paper's recipe otherwise",
    "paper": "LLaVA-1.5-7B on the real data sets",
}
# Verdict: (its words in the count at the top, its class in the page's style).
_VERDICTS = {
    APPEARS: ("shown", "yes"),
    CONTRARY: ("contradicted (the opposite was measured)", "no"),
    NOT_SHOWN: ("not shown (undecided)", "open"),
    MISSING: ("without runs", "none"),
}
_METHOD = (
    "LoRASculpt fine-tunes a vision-language model with LoRA and keeps it from forgetting: after a short warm-up every "
    "LoRA matrix keeps its largest 10 % of entries for good (SRR), and a regularizer steers the updates away from the "
    "weights that matter most to the pretrained model (RKH). Source is what the model could do before (mean of OKVQA, "
    "OCRVQA, GQA and TextVQA), Target what it is taught (IconQA accuracy, or COCO caption CIDEr); Avg is their mean."
)
_READING = (
    "A finding appears if the 95 % interval (Student's t over seeds, runs paired by seed) of the difference that it "
    "claims lies on the claimed side of 0, does not if it lies on the other side, and is not shown if it holds 0: more "
    f'seeds could decide. "No lower Target" allows a loss of {TARGET_MARGIN:.0%} of LoRA\'s Target.'
)
_MARKS = "Bold is the best, underlined the second best of a block; ↑ is the lead in Avg over the second best."
_CHOICE = (
    "The score is the mean of Source as a share of zero-shot Source and Target as a share of the best Target that any "
    "setting reached (configs/grids/select.yaml)."
)


@dataclass
class ReportFigure:
    """A figure with its caption; `drawn` is None if there is nothing to draw."""

    name: str
    title: str
    caption: str
    drawn: Figure | None


@dataclass
class Missing:
    """The missing runs of a grid: counts, the settings without any run, and the command that does them."""

    grid: str
    there: int
    wanted: int
    settings: list[str]
    command: str


@dataclass
class Report:
    """Everything that the pages show."""

    scale: str
    seeds: int
    runs: int
    claims: list[Claim]
    tables: list[Table]
    figures: list[ReportFigure]
    choices: list[Choice]
    missing: list[Missing]
    notes: list[str]
    facts: list[tuple[str, str]]

    @property
    def opening(self) -> str:
        """Scale, seeds, and how many findings have which verdict, in a sentence or two."""
        verdicts = [claim.verdict for claim in self.claims]
        parts = [
            f"{verdicts.count(verdict)} {words}" for verdict, (words, _) in _VERDICTS.items() if verdict in verdicts
        ]
        seeds = "one seed, so without intervals" if self.seeds == 1 else f"up to {self.seeds} seeds"
        return (
            f"Measured at {self.scale} scale ({_SCALES[self.scale]}): {self.runs} runs, {seeds}. "
            f"Of {len(self.claims)} findings of the paper (one for each task): {', '.join(parts)}."
        )


def _plain(text: str) -> str:
    """Text from result and grid files, so that Markdown takes none of it for markup."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def render(report: Report, page: str) -> str:
    """One of PAGES, filled."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=page.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    return environment.get_template(page).render(
        report=report,
        method=_METHOD,
        reading=_READING,
        marks=_MARKS,
        choice=_CHOICE,
        columns=COLUMN_NAMES,
        tasks=TASKS,
        classes={verdict: style for verdict, (_, style) in _VERDICTS.items()},
        svg=figures.to_svg,
    )
