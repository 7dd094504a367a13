"""Results as text: the paper's table, and the line under it that says what each number is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_sculpt.names import SOURCES, task_label

_TASK_COLUMNS = {task_label(name): name for name in SOURCES}
_SUMMARY_COLUMNS = {"Source": "source", "Target": "target", "Avg": "avg"}


def table_cells(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[str]]:
    """The header, then one line per (label, results of `evaluate`); "-" where a part was not evaluated."""
    lines = [["", *_TASK_COLUMNS, *_SUMMARY_COLUMNS]]
    for label, results in rows:
        values = [results["tasks"].get(task, {}).get("score") for task in _TASK_COLUMNS.values()]
        values += [results.get(key) for key in _SUMMARY_COLUMNS.values()]
        lines.append([label, *("-" if value is None else f"{value:.2f}" for value in values)])
    return lines


def format_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """`table_cells` as text."""
    cells = table_cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def format_details(results: Mapping[str, Any]) -> str:
    """One line per task: score with metric, N, split, prompt style, decoding and scorer variant."""
    lines = []
    for name, entry in results["tasks"].items():
        further = "".join(f", {kind} {entry[kind]:.2f}" for kind in ("binary", "open") if kind in entry)
        lines.append(
            f"{name}: {entry['metric']} {entry['score']:.2f}{further} (N {entry['n']}, {entry['split']}; "
            f"prompt: {entry['prompt_style']}; {entry['decoding']}; scorer: {entry['variant']})"
        )
    return "\n".join(lines)
