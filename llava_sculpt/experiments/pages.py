"""A report as Markdown, and as one HTML page that needs nothing beside it."""

from __future__ import annotations

import string
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llava_sculpt.experiments import figures
from llava_sculpt.experiments.claims import (
    APPEARS,
    CONTRARY,
    MISSING,
    NOT_SHOWN,
    TARGET_MARGIN,
    Claim,
    count,
    task_name,
)
from llava_sculpt.experiments.tables import COLUMN_NAMES, Cell, Line, Table

if TYPE_CHECKING:
    from llava_sculpt.experiments.report import Missing, Report

_TEMPLATE = Path(__file__).with_name("report.html")
_SCALES = {
    "tiny": "a 2-million-parameter LLaVA on generated pictures (docs/tiny.md), the paper's recipe otherwise",
    "paper": "LLaVA-1.5-7B on the real data sets",
}
METHOD = (
    "LoRASculpt fine-tunes a vision-language model with LoRA and keeps it from forgetting: after a short warm-up every "
    "LoRA matrix keeps its largest 10 % of entries for good (SRR), and a regularizer steers the updates away from the "
    "weights that matter most to the pretrained model (RKH). Source is what the model could do before (mean of OKVQA, "
    "OCRVQA, GQA and TextVQA), Target what it is taught (IconQA accuracy, or COCO caption CIDEr); Avg is their mean."
)
READING = (
    "A finding appears if the 95 % interval (Student's t over seeds, runs paired by seed) of the difference that it "
    "claims lies on the claimed side of 0, does not if it lies on the other side, and is not shown if it holds 0: more "
    f'seeds could decide. "No lower Target" allows a loss of {TARGET_MARGIN:.0%} of LoRA\'s Target.'
)
_MARKS = "Bold is the best, underlined the second best of a block; ↑ is the lead in Avg over the second best."


def opening(report: Report) -> str:
    """Scale, seeds, and how many findings have which verdict, in a sentence or two."""
    counts = count(report.claims)
    parts = [f"{counts[verdict]} {words}" for verdict, words in _VERDICT_WORDS.items() if counts[verdict]]
    seeds = "one seed, so without intervals" if report.seeds == 1 else f"up to {report.seeds} seeds"
    return (
        f"Measured at {report.scale} scale ({_SCALES[report.scale]}): {report.runs} runs, {seeds}. "
        f"Of {len(report.claims)} findings of the paper (one for each task): {', '.join(parts)}."
    )


_VERDICT_WORDS = {
    APPEARS: "shown",
    CONTRARY: "contradicted (the opposite was measured)",
    NOT_SHOWN: "not shown (undecided)",
    MISSING: "without runs",
}


def to_markdown(report: Report) -> str:
    """The report with its figures as links to the files beside it."""
    lines = [f"# LoRASculpt: the paper's study at {report.scale} scale", "", METHOD, "", opening(report), ""]
    lines += [f"**Note:** {note}\n" for note in report.notes]
    lines += ["## The paper's findings", "", READING, "", "| finding | task | here | measured |", "|---|---|---|---|"]
    lines += [f"| {c.finding} | {task_name(c)} | **{c.verdict}** | {c.evidence} |" for c in report.claims]
    lines += [
        "",
        "## Tables",
        "",
        f"Ours with the half width of its 95 % interval; the paper's value in brackets. {_MARKS}",
    ]
    for table in report.tables:
        lines += ["", *_markdown_table(table)]
    lines += ["", "## Figures"]
    for figure in report.figures:
        lines += ["", f"### {figure.title}", ""]
        lines += [f"![{figure.title}]({figure.name}.svg)", "", figure.caption] if figure.drawn else ["No runs yet."]
    if report.choices:
        lines += [
            "",
            "## Values chosen on validation",
            "",
            _CHOICE,
            "",
            "| task | chosen | settings tried | score | next |",
        ]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| {c.task} | {c.setting} | {c.settings} | {c.score:.4f} | {c.next_score:.4f} |" for c in report.choices
        ]
    lines += ["", "## What is missing", "", *_missing_lines(report.missing)]
    lines += ["", "## How it was measured", "", *(f"- **{name}**: {text}" for name, text in report.facts)]
    return "\n".join(lines) + "\n"


_CHOICE = (
    "The score is the mean of Source as a share of zero-shot Source and Target as a share of the best Target that any "
    "setting reached (configs/grids/select.yaml)."
)


def _missing_lines(missing: list[Missing]) -> list[str]:
    if not missing:
        return ["Nothing: every run of every table and figure is there."]
    lines = []
    for grid in missing:
        lines.append(f"- **{grid.grid}**: {grid.wanted - grid.there} of {grid.wanted} runs. `{grid.command}`")
        if grid.settings:
            lines.append(f"  Without any: {', '.join(grid.settings)}")
    return lines


def _markdown_table(table: Table) -> list[str]:
    lines = [
        f"### {table.title}",
        "",
        "| | seeds | " + " | ".join(COLUMN_NAMES[column] for column in table.columns) + " |",
    ]
    lines.append("|---" * (len(table.columns) + 2) + "|")
    for block in table.blocks:
        if block.heading and block.lines:
            lines.append(f"| *{block.heading}* |" + " |" * (len(table.columns) + 1))
        for line in block.lines:
            cells = " | ".join(_markdown_cell(cell) for cell in line.cells)
            lines.append(f"| {line.label} | {_seeds(line)} | {cells} |")
    if table.missing:
        lines += ["", f"Not run yet: {'; '.join(table.missing)}."]
    return lines


def _markdown_cell(cell: Cell) -> str:
    text = _number(cell)
    text = f"**{text}**" if cell.mark == "best" else f"<u>{text}</u>" if cell.mark == "second" else text
    if cell.ahead is not None:
        text += f" ↑{cell.ahead:.2f}"
    return text + (f" [{cell.paper:.2f}]" if cell.paper is not None else "")


def _number(cell: Cell) -> str:
    if cell.mean is None:
        return "–"
    return f"{cell.mean:.2f}" + ("" if cell.half is None else f" ± {cell.half:.2f}")


def _seeds(line: Line) -> str:
    return str(len(line.seeds)) if line.seeds != [None] else ""


def to_html(report: Report) -> str:
    """The report as a page with its style and figures inside."""
    parts = {
        "scale": escape(report.scale),
        "method": escape(METHOD),
        "opening": escape(opening(report)),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        "claims": "\n".join(_html_claim(claim) for claim in report.claims),
        "reading": escape(READING),
        "marks": escape(_MARKS),
        "frontier": _html_figures(report, ["frontier"]),
        "tables": "\n".join(_html_table(table) for table in report.tables),
        "figures": _html_figures(report, [figure.name for figure in report.figures if figure.name != "frontier"]),
        "choices": _html_choices(report),
        "missing": _html_missing(report.missing),
        "facts": "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.facts),
    }
    return string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(parts)


_VERDICT_CLASSES = {APPEARS: "yes", CONTRARY: "no", NOT_SHOWN: "open", MISSING: "none"}


def _html_claim(claim: Claim) -> str:
    return (
        f'<tr><td>{escape(claim.finding)}</td><td class="task">{escape(task_name(claim))}</td>'
        f'<td><span class="verdict {_VERDICT_CLASSES[claim.verdict]}">{escape(claim.verdict)}</span></td>'
        f'<td class="evidence">{escape(claim.evidence)}</td></tr>'
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(COLUMN_NAMES[column])}</th>" for column in table.columns)
    body = []
    for block in table.blocks:
        if block.heading and block.lines:
            body.append(f'<tr class="block"><th colspan="{len(table.columns) + 2}">{escape(block.heading)}</th></tr>')
        for line in block.lines:
            cells = "".join(_html_cell(cell) for cell in line.cells)
            ours = ' class="ours"' if line.label in ("LoRASculpt", "SRR + RKH", "Ours / Ours") else ""
            body.append(f'<tr{ours}><th scope="row">{escape(line.label)}</th><td>{_seeds(line)}</td>{cells}</tr>')
    missing = f'<p class="note">Not run yet: {escape("; ".join(table.missing))}.</p>' if table.missing else ""
    return (
        f'<section class="table"><h3>{escape(table.title)}</h3><div class="scroll"><table class="numbers">'
        f"<thead><tr><th></th><th>seeds</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{missing}</section>"
    )


def _html_cell(cell: Cell) -> str:
    if cell.mean is None:
        value = '<span class="value">–</span>'
    else:
        value = f'<span class="value">{cell.mean:.2f}</span>'
        value += f'<span class="half"> ± {cell.half:.2f}</span>' if cell.half is not None else ""
        value += f'<span class="ahead"> ↑{cell.ahead:.2f}</span>' if cell.ahead is not None else ""
    paper = f'<span class="paper">{cell.paper:.2f}</span>' if cell.paper is not None else ""
    return f'<td class="{cell.mark}">{value}{paper}</td>'


def _html_figures(report: Report, names: list[str]) -> str:
    parts = []
    for figure in report.figures:
        if figure.name in names:
            inside = figures.to_svg(figure.drawn, figure.name) if figure.drawn else '<p class="note">No runs yet.</p>'
            caption = f"<figcaption><strong>{escape(figure.title)}.</strong> {escape(figure.caption)}</figcaption>"
            parts.append(f"<figure>{inside}{caption}</figure>")
    return "\n".join(parts)


def _html_choices(report: Report) -> str:
    if not report.choices:
        return '<p class="note">No search on validation is among the results.</p>'
    rows = "".join(
        f"<tr><td>{escape(c.task)}</td><td>{escape(c.setting)}</td><td>{c.settings}</td><td>{c.score:.4f}</td>"
        f"<td>{c.next_score:.4f}</td></tr>"
        for c in report.choices
    )
    return (
        f"<p>{escape(_CHOICE)}</p><table><thead><tr><th>task</th><th>chosen</th><th>settings tried</th><th>score</th>"
        f"<th>next</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _html_missing(missing: list[Missing]) -> str:
    if not missing:
        return "<p>Nothing: every run of every table and figure is there.</p>"
    items = []
    for grid in missing:
        without = f"<br>Without any: {escape(', '.join(grid.settings))}" if grid.settings else ""
        count_text = f"{grid.wanted - grid.there} of {grid.wanted} runs"
        items.append(
            f"<li><strong>{escape(grid.grid)}</strong>: {count_text}. <code>{escape(grid.command)}</code>{without}</li>"
        )
    return f"<ul>{''.join(items)}</ul>"
