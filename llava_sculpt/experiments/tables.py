"""The paper's tables from our results: each value beside the paper's, best and second best marked as the paper does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_sculpt.experiments.summary import SCORES, Row
from llava_sculpt.names import METHODS, SOURCES, TASKS, ZERO_SHOT

PAPER_FILE = Path(__file__).with_name("paper_results.json")
COLUMN_NAMES = {**{name: TASKS[name].label for name in SOURCES}, "source": "Source", "target": "Target", "avg": "Avg"}
_ALL = (*SOURCES, *SCORES)
_CONNECTORS = {"full": "FFT", "lora": "LoRA", "frozen": "Freeze", "sculpt": "Ours"}

Results = Mapping[str, dict[str, Any]]


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
    """A row of a table: a label, the seeds it has, and one cell per column (the cells do not take part in marks if
    it is a reference line)."""

    label: str
    seeds: list[int | None]
    cells: list[Cell]
    reference: bool = False

    @property
    def seed_count(self) -> str:
        """How many seeds; nothing for zero-shot, which has none."""
        return "" if self.seeds == [None] else str(len(self.seeds))


@dataclass
class Block:
    """Lines that are compared with each other."""

    heading: str
    lines: list[Line] = field(default_factory=list)


@dataclass
class Table:
    """A table with its columns; `name` as in the grid."""

    name: str
    title: str
    columns: tuple[str, ...]
    blocks: list[Block]

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


def make_table(name: str, title: str, rows: list[Row]) -> list[Table]:
    """The table or tables of a grid (one per Target in Table 1 and 3); [] for a figure's grid."""
    paper = read_paper()
    maker = {"table1": _table1, "table2": _table2, "table3": _table3, "tableI": _table_i}.get(name)
    tables = maker(title, rows, paper) if maker else []
    for table in tables:
        for block in table.blocks:
            _mark(block)
    return tables


def _table1(title: str, rows: list[Row], paper: dict[str, Any]) -> list[Table]:
    tables = []
    for task in _tasks(rows):
        here, known = [row for row in rows if row.task == task], paper["table_1"]
        blocks = [
            Block(
                "",
                [
                    _line(row, _ALL, known["zero_shot"][TASKS[task].label], reference=True)
                    for row in here
                    if row.run.method == ZERO_SHOT
                ],
            )
        ]
        for rank in sorted({row.run.setting("lora_r") for row in here if row.run.seed is not None}):
            block = Block(f"LoRA rank {rank}")
            for method in METHODS:
                values = known["ranks"].get(str(rank), {}).get(METHODS[method].label, {}).get(TASKS[task].label, {})
                block.lines += [
                    _line(row, _ALL, values)
                    for row in here
                    if row.run.method == method and row.run.setting("lora_r") == rank
                ]
            blocks.append(block)
        tables.append(Table(f"table1_{task}", f"Table 1, {TASKS[task].label}: {title}", _ALL, blocks))
    return tables


def _table2(title: str, rows: list[Row], paper: dict[str, Any]) -> list[Table]:
    known = {(line["llm"], line["connector"]): line for line in paper["table_2_iconqa_rank_64"]}
    block = Block("LLM and connector, rank 64")
    blocks = [Block(""), block]
    for row in rows:
        if row.run.method == ZERO_SHOT:
            blocks[0].lines.append(_line(row, _ALL, known["Zero-shot", None], reference=True))
            continue
        llm, connector = "Ours" if row.run.method == "sculpt" else "LoRA", _CONNECTORS[row.run.setting("connector")]
        block.lines.append(_line(row, _ALL, known.get((llm, connector), {}), label=f"{llm} / {connector}"))
    return [Table("table2", f"Table 2, IconQA: {title}", _ALL, blocks)]


def _table3(title: str, rows: list[Row], paper: dict[str, Any]) -> list[Table]:
    known = {(line["srr"], line["rkh"]): line for line in paper["table_3_rank_32"]}
    tables = []
    for task in _tasks(rows):
        reference, block = Block(""), Block("rank 32")
        for row in (row for row in rows if row.task == task):
            if row.run.method == ZERO_SHOT:
                values = known[None, None][TASKS[task].label]
                reference.lines.append(_line(row, SCORES, values, reference=True))
                continue
            srr, rkh = parts_of(row)
            values = known.get((srr, rkh), {}).get(TASKS[task].label, {})
            label = " + ".join([*(["SRR"] if srr else []), *(["RKH"] if rkh else [])]) or "LoRA (neither)"
            block.lines.append(_line(row, SCORES, values, label=label))
        block.lines.sort(key=lambda line: ("LoRA (neither)", "RKH", "SRR", "SRR + RKH").index(line.label))
        tables.append(Table(f"table3_{task}", f"Table 3, {TASKS[task].label}: {title}", SCORES, [reference, block]))
    return tables


def parts_of(row: Row) -> tuple[bool, bool]:
    """Whether a setting prunes (SRR), and whether it regularizes (RKH)."""
    if row.run.method != "sculpt":
        return False, False
    return row.run.setting("sculpt_density") < 1, row.run.setting("sculpt_alpha") > 0


def _table_i(title: str, rows: list[Row], paper: dict[str, Any]) -> list[Table]:
    known = paper["table_I_beta_iconqa_rank_64"]
    block = Block("connector: LoRA with its regularizer, rank 64")
    for row in rows:
        beta = row.run.setting("sculpt_beta")
        at = known["beta"].index(beta) if beta in known["beta"] else None
        values = {} if at is None else {name: known[name][at] for name in ("Source", "Target", "Avg")}
        block.lines.append(_line(row, SCORES, values, label=f"beta = {beta:g}"))
    return [Table("tableI", f"Table I, IconQA: {title}", SCORES, [block])]


def _tasks(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.task for row in rows))


def _line(
    row: Row, columns: tuple[str, ...], paper: Mapping[str, Any], *, label: str | None = None, reference: bool = False
) -> Line:
    cells = []
    for column in columns:
        mean, half = row.mean(column) or (None, None)
        cells.append(Cell(mean, half, paper.get(COLUMN_NAMES[column])))
    return Line(label or METHODS[row.run.method].label, sorted(row.results, key=str), cells, reference)


def _mark(block: Block) -> None:
    lines = [line for line in block.lines if not line.reference and line.seeds]
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
