"""What is shown on a terminal alone: a bar that does not tear, a spinner, rules around a summary, a table that fits.

A log file, a pipe and the processes behind the first get none of it, so that they hold plain lines only.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the original LLaVA's environment may lack it, and quick commands do not need it
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
_BETWEEN = 0.1  # seconds from one drawing to the next
_LEAST = 5  # columns of the bar proper, for which facts are left out


def on_terminal() -> bool:
    """Whether this process draws: the first one, with both of its outputs on a terminal that can move its cursor."""
    first = os.environ.get("RANK", "0") == "0"
    return first and sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb")


class ProgressBar:
    """A context that shows how far something is: what is printed, warned or logged inside appears above it.

    It is drawn by the calls of `to`, not by a thread, whose locks a forked data loader would inherit. Bars nest.

    Args:
        title: what is counted. total: how many there are. done: how many there were before; they say nothing about
            how fast this process is.
        unit: written behind the count.
        keep: leave the bar on the screen at the end.
        shown: False shows nothing, as where there is no terminal.

    Attributes:
        shown: whether there is a bar.
        facts: shown behind the count, as many from the first on as the terminal is wide enough for.
    """

    def __init__(
        self, title: str, total: float, done: float = 0, *, unit: str = "", keep: bool = True, shown: bool = True
    ) -> None:
        self.shown = shown and on_terminal()
        self.facts: list[str] = []
        self._title, self._unit, self._keep, self._counts = title, unit, keep, (done, total)
        self._display: Progress | None = None
        self._drawn = 0.0

    def __enter__(self) -> ProgressBar:
        if self.shown:
            from rich.constrain import Constrain
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            class Short(Progress):
                """Leaves room for the ^C that a terminal shows: on a line of its own it would tear the bar."""

                def get_renderable(self) -> Constrain:
                    return Constrain(super().get_renderable(), _console().width - 3)

            self._display = Short(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn("{task.fields[behind]}", markup=False),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[clock]}"),
                console=_console(),
                auto_refresh=False,
                transient=not self._keep,
                expand=True,
                speed_estimate_period=600,
            )
            done, total = self._counts
            self._display.add_task(self._title, total=total, behind="", clock="left")
            self.to(done)
            self._display.start()
            self._streams = _lead_logs_to(sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self.to(self._counts[0])
            for handler, stream in self._streams:
                handler.setStream(stream)
            self._display.stop()

    def to(self, done: float) -> None:
        """So much is done; drawn at once, or with a later call if the last drawing was just now."""
        total = self._counts[1]
        self._counts = done, total
        if self._display is None:
            return
        behind = f"{done:,.0f}/{total:,.0f}{self._unit}"
        room = _console().width - len(self._title) - _LEAST - len("  0:00:00 left   ")
        for fact in self.facts:
            if len(behind) + 2 + len(fact) > room:
                break
            behind += f"  {fact}"
        (task,) = self._display.task_ids
        clock = "left" if done < total else "in all"
        self._display.update(task, completed=done, behind=behind, clock=clock)
        now = time.monotonic()
        if now - self._drawn >= _BETWEEN:
            self._drawn = now
            self._display.refresh()

    def step(self) -> None:
        """One more is done."""
        self.to(self._counts[0] + 1)


def counted(items: Iterable[T], title: str, total: int, *, shown: bool = True) -> Iterator[T]:
    """The items, while a bar shows how many of them are done."""
    with ProgressBar(title, total, keep=False, shown=shown) as bar:
        for item in items:
            yield item
            bar.step()


def waiting(text: str) -> AbstractContextManager[Any]:
    """A context that shows `text` with a spinner. Nothing inside may fork: a thread draws."""
    if not on_terminal():
        return nullcontext()
    from rich.text import Text

    return _console().status(Text(text))


@contextmanager
def panel(title: str) -> Iterator[None]:
    """What is printed inside stands between two rules, the upper one with the title; elsewhere below an empty line."""
    print()
    if not on_terminal():
        yield
        return
    from rich.text import Text

    _console().rule(Text(title, "bold"), align="left")
    yield
    _console().rule()


def print_table(cells: Sequence[Sequence[str]], plain: str) -> None:
    """On a terminal a table, rows and columns exchanged where it is too narrow for `plain`; elsewhere `plain`.

    Args:
        cells: the header, then the rows; the last one is what it is about.
    """
    if not on_terminal():
        print(plain)
        return
    from rich import box
    from rich.table import Table

    narrow = len(max(plain.splitlines(), key=len)) + 2 > _console().width
    header, *rows = zip(*cells, strict=True) if narrow else cells
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header, 1):
        bold = "bold" if narrow and number == len(header) else ""
        table.add_column(name, justify="left" if number == 1 else "right", style=bold, overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if not narrow and row is rows[-1] else "")
    _console().print(table)


@lru_cache
def _console() -> Console:
    from rich.console import Console

    class WithCursor(Console):
        """A console that never hides the cursor: a killed process could not bring it back."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

    return WithCursor(stderr=True, force_terminal=True, highlight=False, markup=False)


def _lead_logs_to(stream: Any) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Let loggers write to `stream` what they have written to the terminal; their streams as they were before."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    there = (sys.__stdout__, sys.__stderr__)
    ours = [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream in there]
    return [(handler, handler.setStream(stream)) for handler in ours]
