"""The paper's tables from our results: each value beside the paper's, best and second best marked as the paper does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from llava_sculpt.experiments.results import mean_and_interval
from llava_sculpt.experiments.summary import SCORES, Row, mean_over
from llava_sculpt.names import METHODS, SOURCES, ZERO_SHOT, task_label

PAPER_FILE = Path(__file__).with_name("paper_results.json")
COLUMN_NAMES = {**{name: task_label(name) for name in SOURCES}, "source": "Source", "target": "Target", "avg": "Avg"}
_ALL = (*SOURCES, *SCORES)
_COLUMNS = {"table1": _ALL, "table2": _ALL, "table3": SCORES, "tableI": SCORES}
_CONNECTORS = {"full": "FFT", "lora": "LoRA", "frozen": "Freeze", "sculpt": "Ours"}
_PARTS = {(False, False): "LoRA (neither)", (False, True): "RKH", (True, False): "SRR", (True, True): "SRR + RKH"}


@dataclass
class Cell:
    """One number of a table: ours over its seeds, and the paper's.

    Args:
        mean, half: of the seeds, and the half width of its 95 % interval; None where there is none.
        mark: best or second within its block, or "".
        ahead: of the second best, for the best Avg of a block.
    """

    mean: float | None
    half: float | None
    paper: float | None
    mark: str = ""
    ahead: float | None = None


@dataclass
class Line:
    """A row of a table: a label, the seeds it has, and one cell per column."""

    label: str
    seeds: list[int | None]
    cells: list[Cell]

    @property
    def seed_count(self) -> str:
        """How many seeds; nothing for zero-shot, which has none."""
        return "" if self.seeds == [None] else str(len(self.seeds))


@dataclass
class Block:
    """Lines that are compared with each other (zero-shot's takes no part)."""

    heading: str
    lines: list[Line] = field(default_factory=list)


@dataclass
class Table:
    """A table with its columns."""

    name: str
    title: str
    columns: tuple[str, ...]
    blocks: list[Block]

    def __post_init__(self) -> None:
        for block in self.blocks:
            _mark(block)

    @property
    def missing(self) -> list[str]:
        """The lines without a result."""
        return [
            f"{block.heading}: {line.label}" if block.heading else line.label
            for block in self.blocks
            for line in block.lines
            if not line.seeds
        ]


def read_paper() -> dict[str, Any]:
    """The values of the paper's tables."""
    return json.loads(PAPER_FILE.read_text(encoding="utf-8"))


def make_table(grid: str, title: str, rows: list[Row]) -> list[Table]:
    """The tables of a grid, one per Target; [] for a figure's grid."""
    paper, tables = read_paper(), []
    for task in _tasks(rows) if grid in _COLUMNS else []:
        here = [row for row in rows if row.task == task]
        if grid == "table3":
            here.sort(key=lambda row: (row.run.method != ZERO_SHOT, parts_of(row)))
        blocks: dict[str, Block] = {}
        for row in here:
            heading, label, values = _described(grid, row, paper)
            blocks.setdefault(heading, Block(heading)).lines.append(_line([row], _COLUMNS[grid], values, label))
        named = f"Table {grid.removeprefix('table')}, {task_label(task)}: {title}"
        tables.append(Table(f"{grid}_{task}", named, _COLUMNS[grid], list(blocks.values())))
    return tables


def _described(grid: str, row: Row, paper: dict[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    """The heading of a row's block, the row's label, and the paper's values by column name."""
    run, label = row.run, METHODS[row.run.method].label
    if run.method == ZERO_SHOT:
        return "", label, _of_paper(paper, row)
    if grid == "table1":
        return f"LoRA rank {run.setting('lora_r')}", label, _of_paper(paper, row)
    if grid == "table2":
        parts = "Ours" if run.method == "sculpt" else "LoRA", _CONNECTORS[run.setting("connector")]
        modes = {(line["llm"], line["connector"]): line for line in paper["table_2_iconqa_rank_64"]}
        return "LLM and connector, rank 64", " / ".join(parts), modes.get(parts, {})
    if grid == "table3":
        ablations = {(line["srr"], line["rkh"]): line for line in paper["table_3_rank_32"]}
        values = ablations.get(parts_of(row), {}).get(task_label(row.task), {})
        return "rank 32", _PARTS[parts_of(row)], values
    known, beta = paper["table_I_beta_iconqa_rank_64"], run.setting("sculpt_beta")
    names = ("Source", "Target", "Avg") if beta in known["beta"] else ()
    values = {name: known[name][known["beta"].index(beta)] for name in names}
    return "connector: LoRA with its regularizer, rank 64", f"beta = {beta:g}", values


def overview(rows: list[Row]) -> Table:
    """Table 1 in short: every method's means over its ranks, seed by seed, with the paper's mean over the same."""
    paper, blocks = read_paper(), []
    for task in _tasks(rows):
        label, here = task_label(task), [row for row in rows if row.task == task]
        block = Block(label)
        for method in dict.fromkeys(row.run.method for row in here):
            ranked = [row for row in here if row.run.method == method]
            values = [_of_paper(paper, row) for row in ranked]
            means = {name: fmean(value[name] for value in values) for name in values[0]} if all(values) else {}
            block.lines.append(_line(ranked, SCORES, means, METHODS[method].label))
        blocks.append(block)
    return Table("overview", "All methods: Table 1, means over the ranks", SCORES, blocks)


def _of_paper(paper: dict[str, Any], row: Row) -> dict[str, float]:
    """The paper's Table 1 for a row; {} where it has none."""
    table, label = paper["table_1"], task_label(row.task)
    if row.run.method == ZERO_SHOT:
        return table["zero_shot"][label]
    return table["ranks"].get(str(row.run.setting("lora_r")), {}).get(METHODS[row.run.method].label, {}).get(label, {})


def parts_of(row: Row) -> tuple[bool, bool]:
    """Whether a setting prunes (SRR), and whether it regularizes (RKH)."""
    if row.run.method != "sculpt":
        return False, False
    return row.run.setting("sculpt_density") < 1, row.run.setting("sculpt_alpha") > 0


def _tasks(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.task for row in rows))


def _line(rows: Sequence[Row], columns: tuple[str, ...], paper: Mapping[str, Any], label: str) -> Line:
    """Means of the rows beside the paper's values."""
    cells, seeds = [], list(mean_over(rows, columns[0]))
    for column in columns:
        values = list(mean_over(rows, column).values())
        mean, half = mean_and_interval(values) if values else (None, None)
        cells.append(Cell(mean, half, paper.get(COLUMN_NAMES[column])))
    return Line(label, sorted(seeds, key=str), cells)


def _mark(block: Block) -> None:
    lines = [line for line in block.lines if line.seeds not in ([], [None])]
    if len(lines) < 2:
        return
    for column in range(len(lines[0].cells)):
        cells = sorted((line.cells[column] for line in lines), key=lambda cell: -(cell.mean or 0.0))
        # As printed: what looks equal is equally good.
        values = sorted({round(cell.mean or 0.0, 2) for cell in cells}, reverse=True)
        for cell in cells:
            place = values.index(round(cell.mean or 0.0, 2))
            cell.mark = ("best", "second")[place] if place < 2 else ""
        if column == len(lines[0].cells) - 1 and len(values) > 1 and sum(cell.mark == "best" for cell in cells) == 1:
            cells[0].ahead = (cells[0].mean or 0.0) - (cells[1].mean or 0.0)
