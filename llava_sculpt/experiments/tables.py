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
from llava_sculpt.names import METHODS, SOURCES, TASKS, ZERO_SHOT

PAPER_FILE = Path(__file__).with_name("paper_results.json")
COLUMN_NAMES = {**{name: TASKS[name].label for name in SOURCES}, "source": "Source", "target": "Target", "avg": "Avg"}
_ALL = (*SOURCES, *SCORES)
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
    """A table with its columns; `name` as in the grid."""

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


def make_table(name: str, title: str, rows: list[Row]) -> list[Table]:
    """The table or tables of a grid (one per Target in Table 1 and 3); [] for a figure's grid."""
    maker = {"table1": _table1, "table2": _table2, "table3": _table3, "tableI": _table_i}.get(name)
    return maker(title, rows, read_paper()) if maker else []


def overview(rows: list[Row]) -> Table:
    """Table 1 in short: every method's means over its ranks, seed by seed, with the paper's mean over the same."""
    known, blocks = read_paper()["table_1"], []
    for task in _tasks(rows):
        label, here = TASKS[task].label, [row for row in rows if row.task == task]
        block = Block(label)
        for method in dict.fromkeys(row.run.method for row in here):
            ranked = [row for row in here if row.run.method == method]
            values = [_of_paper(known, row) for row in ranked]
            paper = {name: fmean(value[name] for value in values) for name in values[0]} if all(values) else {}
            block.lines.append(_line(ranked, SCORES, paper))
        blocks.append(block)
    return Table("overview", "All methods: Table 1, means over the ranks", SCORES, blocks)


def _table1(title: str, rows: list[Row], paper: dict[str, Any]) -> list[Table]:
    tables = []
    for task in _tasks(rows):
        blocks: dict[int | None, Block] = {}
        for row in (row for row in rows if row.task == task):
            rank = row.run.setting("lora_r")
            block = blocks.setdefault(rank, Block("" if rank is None else f"LoRA rank {rank}"))
            block.lines.append(_line([row], _ALL, _of_paper(paper["table_1"], row)))
        ordered = [blocks[rank] for rank in sorted(blocks, key=lambda rank: rank or 0)]
        tables.append(Table(f"table1_{task}", f"Table 1, {TASKS[task].label}: {title}", _ALL, ordered))
    return tables


def _of_paper(table: dict[str, Any], row: Row) -> dict[str, float]:
    """The paper's Table 1 for a row; {} where it has none."""
    if row.run.method == ZERO_SHOT:
        return table["zero_shot"][TASKS[row.task].label]
    methods = table["ranks"].get(str(row.run.setting("lora_r")), {})
    return methods.get(METHODS[row.run.method].label, {}).get(TASKS[row.task].label, {})


def _table2(title: str, rows: list[Row], paper: dict[str, Any]) -> list[Table]:
    known = {(line["llm"], line["connector"]): line for line in paper["table_2_iconqa_rank_64"]}
    reference, block = Block(""), Block("LLM and connector, rank 64")
    for row in rows:
        if row.run.method == ZERO_SHOT:
            reference.lines.append(_line([row], _ALL, known["Zero-shot", None]))
            continue
        llm, connector = "Ours" if row.run.method == "sculpt" else "LoRA", _CONNECTORS[row.run.setting("connector")]
        block.lines.append(_line([row], _ALL, known.get((llm, connector), {}), f"{llm} / {connector}"))
    return [Table("table2", f"Table 2, IconQA: {title}", _ALL, [reference, block])]


def _table3(title: str, rows: list[Row], paper: dict[str, Any]) -> list[Table]:
    known = {(line["srr"], line["rkh"]): line for line in paper["table_3_rank_32"]}
    tables = []
    for task in _tasks(rows):
        label, reference, block = TASKS[task].label, Block(""), Block("rank 32")
        for row in (row for row in rows if row.task == task):
            if row.run.method == ZERO_SHOT:
                reference.lines.append(_line([row], SCORES, known[None, None][label]))
            else:
                values = known.get(parts_of(row), {}).get(label, {})
                block.lines.append(_line([row], SCORES, values, _PARTS[parts_of(row)]))
        block.lines.sort(key=lambda line: list(_PARTS.values()).index(line.label))
        tables.append(Table(f"table3_{task}", f"Table 3, {label}: {title}", SCORES, [reference, block]))
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
        block.lines.append(_line([row], SCORES, values, f"beta = {beta:g}"))
    return [Table("tableI", f"Table I, IconQA: {title}", SCORES, [block])]


def _tasks(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.task for row in rows))


def _line(rows: Sequence[Row], columns: tuple[str, ...], paper: Mapping[str, Any], label: str = "") -> Line:
    """Means of the rows, which are one method's; its label by default."""
    cells, seeds = [], list(mean_over(rows, columns[0]))
    for column in columns:
        values = list(mean_over(rows, column).values())
        mean, half = mean_and_interval(values) if values else (None, None)
        cells.append(Cell(mean, half, paper.get(COLUMN_NAMES[column])))
    return Line(label or METHODS[rows[0].run.method].label, sorted(seeds, key=str), cells)


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
