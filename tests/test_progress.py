"""What a terminal shows: one bar that lines, warnings and logs leave whole, and a table that fits. In a pipe: lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.screen import screen, shown

LOOP = """
import logging, sys, time, warnings
from llava_sculpt.progress import ProgressBar, counted, panel, print_table, waiting

handler = logging.StreamHandler()  # made before the bar, as libraries make theirs
logging.getLogger("library").addHandler(handler)
with waiting("loading [a] model"):
    pass
with ProgressBar("training", 40) as bar:
    for step in range(1, 41):
        bar.facts = ["loss 1.234", "lr 2.0e-4", "tok/s 1234"]
        bar.to(step)
        bar._drawn = 0.0  # draw every time
        if step == 10:
            print("a line", flush=True)
            logging.getLogger("library").warning("of a logger")
            warnings.warn("[b] careful")
        if step == 20:
            assert [time.sleep(0.11) for _ in counted("ab", "held-out samples", 2)] == [None, None]
            print("another", file=sys.stderr)
    if sys.argv[1:]:
        raise SystemExit("error: stopped")
with panel("a [c] title"):
    print_table([["", "OKVQA", "Avg"], ["Zero-shot", "1.00", "2.00"], ["x" * 50, "3.00", "4.00"]], "x" * 70)
    print("results: here")
assert handler.stream is sys.stderr
"""
PLAIN = ["a line", "of a logger", "another", "results: here"]


@pytest.mark.parametrize("columns", [100, 60])
def test_a_bar_on_a_terminal(columns: int) -> None:
    written = shown([sys.executable, "-c", LOOP], columns)
    assert "?25" not in written  # a process that is killed would leave the terminal without a cursor
    lines = screen(written, columns)
    assert max(map(len, lines)) <= columns
    assert [line for line in lines if line in PLAIN] == PLAIN
    assert sum("[b] careful" in line for line in lines) == 1
    (bar,) = (line for line in lines if "━" in line)
    assert re.fullmatch(r"training ━+ 40/40  loss 1\.234  lr 2\.0e-4.* \d:\d\d:\d\d in all", bar), bar
    assert ("tok/s 1234" in bar) == (columns == 100)
    assert lines.index("another") < lines.index(bar)  # all that was said stands above
    assert "held-out samples" in written and " left" in written
    assert "loading [a] model" in written and any(line.startswith("a [c] title ──") for line in lines)
    cells = [line.split() for line in lines]
    assert (["Zero-shot", "1.00", "2.00"] in cells) == (columns == 100)  # else a column each
    assert any(line[:2] == ["OKVQA", "1.00"] for line in cells) == (columns == 60)


def test_an_error_ends_the_bar_first() -> None:
    lines = screen(shown([sys.executable, "-c", LOOP, "fail"], 100), 100)
    assert lines[-2:] == ["error: stopped", ""] and "40/40" in lines[-3]


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"TERM": "dumb"}])
def test_neither_further_processes_nor_plain_terminals_get_one(environment: dict[str, str]) -> None:
    written = shown([sys.executable, "-c", LOOP], 100, **environment)
    assert "\x1b" not in written and [line for line in written.splitlines() if line in PLAIN] == PLAIN


def test_a_pipe_gets_lines_alone() -> None:
    environment = {**os.environ, "TERM": "xterm", "FORCE_COLOR": "1"}
    run = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == f"a line\n\n{'x' * 70}\nresults: here\n"
    assert [line for line in run.stderr.splitlines() if "careful" not in line] == ["of a logger", "another"]
