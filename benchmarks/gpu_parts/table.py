"""The report as Markdown: one section a part, its tables, and what was not run."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]


def markdown(report: Report, about: dict[str, str]) -> str:
    """The first line says what was measured where.

    Args:
        about: what each part does, in Markdown, by name.
    """
    lines = [report["measured"], ""]
    failed = [name for name, part in report["parts"].items() if part["status"] == "failed"]
    if failed:
        lines += [f"**Failed: {', '.join(failed)}.** What they measured before stands below.", ""]
    lines += ["Numbers with a range: median (least to largest).", ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}", "", about[name], ""]
        if part["status"] != "done":
            lines += [f"**{part['status']}: {part['reason']}**", ""]
        tables: dict[str, list[dict[str, Any]]] = {}
        for case in part["cases"]:
            tables.setdefault(case["table"], []).append(case)
        for title, rows in tables.items():
            lines += [f"### {title}", "", *table(rows), ""]
        if part["cases"]:
            lines += [f"{part['seconds']:.0f} s, commit {part['commit']}.", ""]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each case; a column for all that any of them says, in the order in which it is first said."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("table", "case")))
    head = f"| | {' | '.join(columns)} |"
    body = [f"| {row['case']} | {' | '.join(cell(row.get(name)) for name in columns)} |" for row in rows]
    return [head, f"|{'---|' * (len(columns) + 1)}", *body]


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{number(value['median'])} ({number(value['low'])} to {number(value['high'])})"
    return number(value) if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def number(value: float) -> str:
    """Three significant digits; no exponent where that is short."""
    if value == 0 or not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}" if value else "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
