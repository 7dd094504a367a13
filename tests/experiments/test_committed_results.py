"""What the repository shows of its own results: made of results/tiny/runs by a command that is named beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_sculpt.experiments import figures, report
from llava_sculpt.experiments.grid import read_grid
from llava_sculpt.experiments.pages import PAGES, Report, render
from llava_sculpt.experiments.results import read_results
from tests.experiments.conftest import REPOSITORY

REPORT = Path("results/tiny/report")
GENERATED = re.compile(
    r"<!-- from: llava-sculpt report --scale tiny --out results/tiny/report -->\n(.*?)<!-- end -->", re.S
)


@pytest.fixture(scope="module")
def gathered() -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setattr(figures, "draw", lambda make: True)  # the numbers alone, in a second
        return report.gather("tiny", read_results("tiny"))


def test_report_is_that_of_the_results(gathered: Report) -> None:
    assert render(gathered, "report.md") == (REPOSITORY / REPORT / "report.md").read_text()


@pytest.mark.parametrize(("document", "tables"), [("README.md", 3), ("docs/tiny.md", 1)])
def test_tables_in_the_documents_are_the_report_s(document: str, tables: int) -> None:
    found = GENERATED.findall((REPOSITORY / document).read_text())
    shown = (REPOSITORY / REPORT / "report.md").read_text()
    assert len(found) == tables and all(table in shown for table in found)


def test_no_result_without_a_producer(gathered: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file under results/ is a run of a shipped grid, or written by `report`; and no run is missing."""
    monkeypatch.chdir(REPOSITORY)
    grids = [read_grid(name, "tiny", seeds=3) for name in (*report.TABLE_GRIDS, *report.FIGURE_GRIDS)]
    grids += [read_grid(name, "tiny") for name in (*report.SEARCHES, "forgetting")]
    expected = {Path("results/tiny/runs") / f"{run.name}.json" for grid in grids for run in grid.runs}
    expected |= {REPORT / page for page in PAGES}
    expected |= {REPORT / f"{figure.name}.{kind}" for figure in gathered.figures for kind in ("png", "svg")}
    assert {path for path in Path("results").rglob("*") if path.is_file()} == expected
