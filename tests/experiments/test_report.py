"""The report from made-up results: whole, with holes, with results of different origin; and its intervals and marks."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.experiments.claims import APPEARS, CONTRARY, MISSING, NOT_SHOWN, judge
from llava_sculpt.experiments.grid import Run, read_grid
from llava_sculpt.experiments.report import FIGURE_GRIDS, TABLE_GRIDS, gather
from llava_sculpt.experiments.results import mean_and_interval, read_results, result_file, write_result
from llava_sculpt.experiments.summary import choose, rows_of
from llava_sculpt.experiments.tables import make_table, read_paper
from tests.experiments.conftest import REPOSITORY
from tests.experiments.made_up import made_up_result

GRIDS = (*TABLE_GRIDS, *FIGURE_GRIDS)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def all_runs(seeds: int) -> list[Run]:
    return list({r.name: r for name in GRIDS for r in read_grid(name, "tiny", seeds=seeds).runs}.values())


def write(runs: list[Run]) -> None:
    for run in runs:
        write_result(result_file("tiny", run.name), made_up_result(run))


class Page(HTMLParser):
    """Collects what a browser would fetch, and the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href") and value:
                (self.targets if value.startswith("#") else self.fetched).append(value)


def test_complete_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(all_runs(3))
    assert main(["report", "--scale", "tiny", "--out", "out"]) == 0
    assert "missing" not in capsys.readouterr().out
    html, markdown = (here / "out/report.html").read_text(), (here / "out/report.md").read_text()
    for name in ("frontier", "curves", *FIGURE_GRIDS):
        for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
            assert (here / "out" / f"{name}.{kind}").read_bytes().startswith(start)
        assert f"({name}.svg)" in markdown
    assert html.count("<svg") == 6
    page = Page()
    page.feed(html)
    assert page.fetched == [] and "url(http" not in html and "@import" not in html
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.targets} <= set(page.ids)
    for text in (html, markdown):
        assert "Nothing: every run of every table and figure is there" in text
        assert "COCO-Caption" in text and "14 shown" in text and "None" not in text and "nan" not in text
    # Twice the same: the same bytes.
    assert main(["report", "--scale", "tiny", "--out", "again"]) == 0
    for file in (here / "out").iterdir():
        assert (here / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_report_with_holes_names_them(here: Path, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    runs = all_runs(2)
    kept = [run for run in runs if random.Random(run.name).random() < share] or runs[:1]
    write(kept)
    assert main(["report", "--scale", "tiny", "--out", "out"]) == 0
    told = capsys.readouterr().out
    html = (here / "out/report.html").read_text()
    found = gather("tiny", read_results("tiny"))
    assert found.missing and found.runs == len(kept)
    for missing in found.missing:
        assert missing.command in html and missing.command in told
    assert "Not run yet" in html
    if share == 0.0:  # zero-shot alone
        assert html.count("No runs yet") >= 4 and "16 without runs" in html
        assert {claim.verdict for claim in found.claims} == {MISSING}


def test_no_results(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--scale", "tiny", "--out", "out"]) == 2
    assert "no results on the test split yet" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_damaged_results_are_named(here: Path) -> None:
    write(all_runs(1)[:2])
    for name, text in (("a", "{"), ("b", "{}"), ("c", "[]")):
        (here / "results/tiny/runs" / f"{name}.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_results("tiny")
    named = dict.fromkeys(problem.split(":")[0][-6:] for problem in caught.value.problems)
    assert list(named) == ["a.json", "b.json", "c.json"]


def test_a_result_that_contradicts_itself_is_refused(here: Path) -> None:
    run, other = all_runs(1)[:2]
    good, file = made_up_result(run), result_file("tiny", run.name)
    scores = {task: {**summary, "avg": summary["avg"] + 1} for task, summary in good["scores"].items()}
    for change in ({"run": other.identity}, {"scores": scores}, {"tasks": {}}, {"curve": {"loss": [1.0]}}):
        write_result(file, {**good, **change})
        with pytest.raises(UserError, match=f"{run.name}.*done again"):
            read_results("tiny")
    write_result(file, good)
    assert read_results("tiny") == {run.name: good}


def test_results_of_another_base_or_data_are_left_out(here: Path) -> None:
    runs = all_runs(1)
    write(runs)
    for run, part in ((runs[1], {"base": "c" * 64}), (runs[2], {"data": {"okvqa": "other"}})):
        write_result(result_file("tiny", run.name), {**made_up_result(run), **part})
    found = gather("tiny", read_results("tiny"))
    assert found.runs == len(runs) - 2
    assert found.notes == ["2 results come from another base model or other data and are left out."]


def test_verdicts(here: Path) -> None:
    """One seed shows nothing but densities; turned-over scores are contrary."""

    def verdicts(seeds: int, swap: bool) -> dict[str, str]:
        results = {run.name: made_up_result(run) for run in all_runs(seeds)}
        if swap:
            for content in results.values():
                for scores in content["scores"].values():
                    scores["source"], scores["avg"] = -scores["source"], -scores["avg"]
        rows = {name: rows_of(read_grid(name, "tiny", seeds=seeds).runs, results) for name in GRIDS}
        return {claim.finding: claim.verdict for claim in judge(rows) if claim.task == "iconqa"}

    three, one, turned = verdicts(3, False), verdicts(1, False), verdicts(3, True)
    density = "The measured density of BA is below Theorem 3.1's"
    assert len(three) == 9 and {v for k, v in three.items() if k != "RKH adds to SRR"} == {APPEARS}
    assert three["RKH adds to SRR"] == NOT_SHOWN  # made up without one
    assert {v for k, v in one.items() if k != density} == {NOT_SHOWN} and one[density] == APPEARS
    assert turned["LoRASculpt keeps more Source than LoRA at no lower Target"] == CONTRARY
    assert turned["LoRA's forgetting grows with rank"] == CONTRARY


def test_best_and_second_best_are_marked_and_the_lead_is_told(here: Path) -> None:
    results = {run.name: made_up_result(run) for run in all_runs(3)}
    grid = read_grid("table1", "tiny", seeds=3)
    for table in make_table("table1", grid.title, rows_of(grid.runs, results)):
        assert [len(block.lines) for block in table.blocks] == [1, 7, 7, 7] and not table.missing
        for block in table.blocks[1:]:
            for column in range(7):
                cells = [line.cells[column] for line in block.lines]
                printed = sorted({f"{cell.mean:.2f}" for cell in cells}, key=float, reverse=True)
                marks = {printed[0]: "best", printed[1]: "second"}
                assert [cell.mark for cell in cells] == [marks.get(f"{cell.mean:.2f}", "") for cell in cells]
            best = max(block.lines, key=lambda line: line.cells[-1].mean or 0)
            second = sorted(line.cells[-1].mean or 0 for line in block.lines)[-2]
            assert best.cells[-1].ahead == pytest.approx((best.cells[-1].mean or 0) - second)
            assert all(line.cells[-1].ahead is None for line in block.lines if line is not best)


def test_the_paper_s_values_stand_beside_ours(here: Path) -> None:
    paper = read_paper()
    results = {run.name: made_up_result(run) for run in all_runs(1)}

    def table(name: str) -> dict[str, list[float | None]]:
        grid = read_grid(name, "tiny")
        return {
            f"{table.name}|{block.heading}|{line.label}": [cell.paper for cell in line.cells]
            for table in make_table(name, grid.title, rows_of(grid.runs, results))
            for block in table.blocks
            for line in block.lines
        }

    first = table("table1")
    assert len(first) == 44
    for rank in ("16", "32", "64"):
        for method, tasks in paper["table_1"]["ranks"][rank].items():
            assert first[f"table1_iconqa|LoRA rank {rank}|{method}"] == list(tasks["IconQA"].values())
            assert first[f"table1_coco|LoRA rank {rank}|{method}"] == list(tasks["COCO-Caption"].values())
    assert table("table2")["table2_iconqa|LLM and connector, rank 64|Ours / Ours"][-1] == 72.45
    assert table("table2")["table2_iconqa|LLM and connector, rank 64|LoRA / Freeze"][4] == 50.83
    third = table("table3")
    assert third["table3_coco|rank 32|SRR"] == [53.97, 120.11, 87.04]
    assert third["table3_iconqa|rank 32|RKH"] == [None, None, None]
    assert list(table("tableI").values()) == [
        list(values)
        for values in zip(*(paper["table_I_beta_iconqa_rank_64"][k] for k in ("Source", "Target", "Avg")), strict=True)
    ]


def test_choice_is_the_best_relative_score(here: Path) -> None:
    runs = read_grid("select", "tiny").runs
    results = {run.name: made_up_result(run) for run in runs}
    special = next(r for r in runs if r.method == "sculpt" and r.task == "coco" and r.setting("learning_rate") == 2e-3)
    results[special.name]["scores"]["coco"] = {"source": 97.0, "target": 300.0, "avg": 198.5}
    # Best Target of the task, at no Source: half the score.
    other = next(r for r in runs if r.method == "lora" and r.task == "coco")
    results[other.name]["scores"]["coco"] = {"source": 0.0, "target": 310.0, "avg": 155.0}
    chosen = choose(rows_of(runs, results))
    assert len(chosen) == 10 and all(len(settings) == 4 for settings in chosen.values())
    (best, score), *_ = chosen["coco", "sculpt"]
    zero_shot = results[runs[0].name]["scores"]["coco"]["source"]
    assert best.run.name == special.name and score == pytest.approx((97 / zero_shot + 300 / 310) / 2)
    assert dict((row.run.name, s) for row, s in chosen["coco", "lora"])[other.name] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("n", "quantile"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (31, 2.0423), (32, 2.0395), (61, 2.0003)]
)
def test_interval_is_student_s(n: int, quantile: float) -> None:
    """Against the 97.5 % points of a printed table (the last two are beyond ours)."""
    rng = random.Random(n)
    values = [rng.gauss(50, 3) for _ in range(n)]
    mean, half = mean_and_interval(values)
    deviation = math.sqrt(sum((value - sum(values) / n) ** 2 for value in values) / (n - 1))
    assert mean == pytest.approx(sum(values) / n)
    assert half == pytest.approx(quantile * deviation / math.sqrt(n), rel=1e-4)


def test_one_value_has_no_interval() -> None:
    assert mean_and_interval([5.0]) == (5.0, None)


def test_result_files_have_one_line_for_each_part(here: Path) -> None:
    run = all_runs(1)[1]
    write([run])
    lines = result_file("tiny", run.name).read_text().splitlines()
    assert lines[0] == "{" and lines[-1] == "}" and all(re.match(r'"\w+": ', line) for line in lines[1:-1])
