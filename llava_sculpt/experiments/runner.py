"""`llava-sculpt experiment`: do the runs of one or several grids that are not done yet.

Killed or interrupted at any moment, the same command goes on: a result is there whole or not at all, a half training
continues from its last checkpoint, and the jobs of a killed runner end with it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.experiments.grid import Grid, Run, read_grid
from llava_sculpt.experiments.jobs import Job, adapter_folder, adapter_root, make_plan
from llava_sculpt.experiments.results import read_results, result_file
from llava_sculpt.experiments.summary import choices_of, format_choices, format_rows, rows_of
from llava_sculpt.experiments.worker import PRELOAD, check_inputs, do_job, log_file
from llava_sculpt.records import checked, read_object, write_json

_REFRESH_S = 1.0
# By default glibc gives large freed blocks back to the system and takes them again at every operation; on a CPU that is
# an eighth of a training step. Read when a process starts, ignored by other C libraries.
_KEEP_FREED_MEMORY = (
    "glibc.malloc.trim_threshold=4000000000:glibc.malloc.mmap_threshold=33554432:glibc.malloc.hugetlb=1"
)


def experiment(
    names: Sequence[str],
    scale: str,
    *,
    seeds: int = 1,
    jobs: int | None = None,
    split: str | None = None,
    dry_run: bool = False,
    redo: bool = False,
) -> int:
    """Plan and do the runs of grids.

    Args:
        names: grids (configs/grids/NAME.yaml) or grid files.
        jobs: how many at a time, each with one thread; by default one for each CPU core, at most 8. At scale paper
            always one, over all GPUs.
        split: val or test in place of the grids' own.
        redo: forget the results and adapters of these runs first.

    Returns:
        0, or 1 if a job failed: its log is named, the others are done all the same.

    Raises:
        UserError: everything that is wrong with grids, configurations or data, before the first run.
    """
    problems = [
        f"--{name}: must be at least 1" for name, n in (("seeds", seeds), ("jobs", jobs)) if n is not None and n < 1
    ]
    if scale == "paper" and jobs not in (None, 1):
        problems.append("--jobs: at scale paper one run at a time takes all GPUs")
    grids: list[Grid] = []
    for name in names:
        try:
            grids.append(read_grid(name, scale, split, seeds))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    runs = {run.name: run for grid in grids for run in grid.runs}
    at_a_time = 1 if scale == "paper" else jobs or min(os.cpu_count() or 1, 8)
    results = {} if redo else read_results(scale)
    if dry_run:
        print(_describe(list(runs.values()), make_plan(runs.values(), results), at_a_time))
        return 0
    if scale == "tiny":
        os.environ.setdefault("GLIBC_TUNABLES", _KEEP_FREED_MEMORY)
    import torch  # not for a dry run

    context = multiprocessing.get_context("forkserver")
    # With a GPU nothing is imported ahead: imports already ask CUDA for its devices, and no fork may use it after that.
    context.set_forkserver_preload([] if torch.cuda.is_available() else PRELOAD)
    multiprocessing.forkserver.ensure_running()  # it imports while the inputs are checked
    origin = check_inputs(list(runs.values()))
    if redo:
        _forget(runs.values())
        results = read_results(scale)
    results = _without_outdated(results, runs, origin)
    _keep_adapters_of(origin, scale)
    plan = make_plan(runs.values(), results)
    print(f"{len(runs)} runs, {len(runs) - sum(len(job.scores) for job in plan)} of them done; {len(plan)} jobs to do")
    code = _Runner(context, plan, at_a_time).run()
    _show(grids, read_results(scale))
    return code


def _show(grids: list[Grid], results: dict[str, dict[str, Any]]) -> None:
    for grid in grids:
        rows = rows_of(grid.runs, results)
        print(f"\n{grid.name}: {grid.title}\n{format_rows(rows)}")
        if grid.runs[0].split == "val":
            print(format_choices(choices_of(rows)))


def _describe(runs: list[Run], plan: list[Job], at_a_time: int) -> str:
    lines = [f"{'estimated':>10}  job"]
    lines += [
        f"{_duration(job.seconds):>10}  {job.label}" + ("  (edits LoRA)" if job.run.parent else "") for job in plan
    ]
    done = len(runs) - sum(len(job.scores) for job in plan)
    total = sum(job.seconds for job in plan) / max(1, min(at_a_time, len(plan)))
    trainings = sum(job.run.parent is None and job.run.seed is not None for job in plan)
    edits = sum(job.run.parent is not None for job in plan)
    lines.append(
        f"{len(runs)} runs, {done} of them done. To do: {trainings} trainings, {edits} edits of trained adapters, "
        f"{sum(len(job.scores) for job in plan)} evaluations; about {_duration(total)}, {at_a_time} at a time"
    )
    return "\n".join(lines)


def _forget(runs: Any) -> None:
    for run in runs:
        result_file(run.scale, run.name).unlink(missing_ok=True)
        for maker in filter(None, (run, run.parent)):
            shutil.rmtree(adapter_folder(maker), ignore_errors=True)


def _without_outdated(
    results: dict[str, dict[str, Any]], runs: dict[str, Run], origin: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The results without those that another base model or other data gave; these files are deleted."""
    outdated = []
    for name in results.keys() & runs.keys():
        run, content = runs[name], results[name]
        data = {task: origin["data"][run.split][task] for task in run.tasks}
        if run.seed is not None:
            data["train"] = origin["train"][run.task]
        if content["base"] != origin["base"] or content["data"] != data:
            outdated.append(name)
            result_file(run.scale, name).unlink()
    if outdated:
        print(f"{len(outdated)} results are of another base model or other data: done again")
    return {name: content for name, content in results.items() if name not in outdated}


def _keep_adapters_of(origin: dict[str, Any], scale: str) -> None:
    """Adapters that come from another base model or other training data are set aside, whole."""
    root = adapter_root(scale)
    marker = root / "origin.json"
    here = {"base": origin["base"], **origin["train"]}
    there = checked(read_object(marker), dict[str, str], marker) if marker.exists() else {}
    if any(there[key] != here[key] for key in there.keys() & here.keys()):
        aside = next(path for n in itertools.count(1) if not (path := root.with_name(f"{scale}.{n}")).exists())
        os.replace(root, aside)
        print(f"{root}: its adapters come from another base model or other data: moved to {aside}")
        there = {}
    root.mkdir(parents=True, exist_ok=True)
    write_json(marker, {**there, **here})


class _Runner:
    """Keeps `at_a_time` processes busy with the jobs of a plan, and reports progress."""

    def __init__(self, context: ForkServerContext, plan: list[Job], at_a_time: int) -> None:
        self._context = context
        self._waiting = list(plan)
        self._running: dict[ForkServerProcess, tuple[Job, float]] = {}
        self._at_a_time = at_a_time
        self._failed: list[Job] = []
        self._total = len(plan)
        self._done = 0
        self._started = time.monotonic()
        self._estimated_done = self._measured_done = 0.0

    def run(self) -> int:
        """Returns 0, or 1 if a job failed. KeyboardInterrupt ends the running jobs and is passed on."""
        try:
            while self._waiting or self._running:
                self._start_what_can_start()
                multiprocessing.connection.wait([p.sentinel for p in self._running], timeout=_REFRESH_S)
                for process in [p for p in self._running if not p.is_alive()]:
                    self._finish(process)
                self._show_status()
        except BaseException:
            self._rewrite_line("")
            self._end_jobs()
            raise
        self._rewrite_line("")
        print(
            f"{self._done - len(self._failed)} jobs done in {_duration(time.monotonic() - self._started)}", flush=True
        )
        if self._failed:
            print(f"{len(self._failed)} jobs failed; the same command tries them again", file=sys.stderr)
        return 1 if self._failed else 0

    def _start_what_can_start(self) -> None:
        unmade = {job.run.adapter_name for job in (*self._waiting, *(job for job, _ in self._running.values()))}
        for job in list(self._waiting):
            if len(self._running) >= self._at_a_time:
                return
            if job.after in unmade:
                continue
            self._waiting.remove(job)
            if any(job.after == failed.run.adapter_name for failed in self._failed):
                self._fail(job, "the LoRA that it edits has failed")
                continue
            process = self._context.Process(target=do_job, args=(job,))
            process.start()
            self._running[process] = job, time.monotonic()

    def _finish(self, process: ForkServerProcess) -> None:
        job, started = self._running.pop(process)
        seconds = time.monotonic() - started
        process.join()
        code = process.exitcode
        process.close()
        if code != 0:
            self._fail(job, f"exit code {code}, see {log_file(job)}: {_last_line(log_file(job))}")
            return
        self._done += 1
        self._estimated_done += job.seconds
        self._measured_done += seconds
        self._say(f"{job.label}: done in {_duration(seconds)}")

    def _fail(self, job: Job, why: str) -> None:
        self._done += 1
        self._failed.append(job)
        self._say(f"FAILED {job.label}: {why}")

    def _end_jobs(self) -> None:
        for process in self._running:
            assert process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # DeepSpeed's processes too
            process.kill()
        for process in self._running:
            process.join()

    def _seconds_left(self) -> float:
        """By the estimates, corrected by how they did so far."""
        pace = self._measured_done / self._estimated_done if self._estimated_done else 1.0
        now = time.monotonic()
        running = [max(pace * job.seconds - (now - started), 1.0) for job, started in self._running.values()]
        waiting = [pace * job.seconds for job in self._waiting]
        longest = max([*running, *waiting], default=0.0)
        return max(longest, (sum(running) + sum(waiting)) / self._at_a_time)

    def _say(self, message: str) -> None:
        self._rewrite_line("")
        left = f", about {_duration(self._seconds_left())} left" if self._waiting or self._running else ""
        print(f"[{self._done}/{self._total}{left}] {message}", flush=True)

    def _show_status(self) -> None:
        names = ", ".join(job.label for job, _ in self._running.values())
        self._rewrite_line(f"[{self._done}/{self._total}, about {_duration(self._seconds_left())} left] {names}")

    def _rewrite_line(self, line: str) -> None:
        """Put this in place of the status line of a terminal; "" takes it away."""
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}" + "\r" * (not line), end="", file=sys.stderr, flush=True)


def _last_line(log: Path) -> str:
    """What a failed job said last."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "(no output)"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
