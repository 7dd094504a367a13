"""Everything about speed and memory that only a GPU can tell, in one command of nine minutes on one card.

    make gpu-report                                   # or: python benchmarks/gpu_report.py
    python benchmarks/gpu_report.py --only cmr step   # some parts; --redo: also those that are done
    python benchmarks/gpu_report.py --tiny            # a dry run on the CPU: no number of it is a measurement

Writes benchmarks/gpu/CARD_DATE.json and a table beside it (.md), anew after every part: correctness first, then
medians and ranges of ours beside named baselines of the same run. Weights are random and made on the card; nothing is
downloaded. Each part has a process, a time limit and a log of its own. One that fails leaves its error in the report,
and the others go on. Given again, the command does what is missing: parts that failed, or for which no time was left.
With several GPUs it also trains on all of them, which takes up to five minutes more and 15 GB of disk.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from gpu_parts import NotRun
from gpu_parts.table import markdown
from typing_extensions import TypedDict

from llava_sculpt.errors import UserError, first_line
from llava_sculpt.records import parse_json, read_checked, write_atomically

ROOT = Path(__file__).parents[1]
MINUTES = 9  # for all of it on one card
START = 180  # seconds in which a part's process must have imported what it needs: nearer 10 than this
# Seconds that each part may take from then on, in the order of the report.
LIMITS = {
    "card": 10,
    "correctness": 65,
    "tests": 40,
    "cmr": 35,
    "step": 165,
    "loading": 50,
    "evaluation": 90,
    "peers": 40,
}
ENGINES = "engines"  # only where there are several GPUs
SEVERAL_GPUS = {ENGINES: 300}
PATIENCE = 10  # times all of these in a dry run, whose CPU may have other work


class Part(TypedDict):
    """What is known of one part."""

    status: Literal["done", "failed", "not run"]
    reason: str
    seconds: float
    commit: str
    cases: list[dict[str, Any]]


class Report(TypedDict):
    """The JSON file."""

    measured: str
    cards: list[str]
    date: str
    tiny: bool
    parts: dict[str, Part]


def main(argv: list[str] | None = None) -> int:
    """See the top of the file; 1 if a part failed, 2 for bad input or no GPU, 130 after ctrl-C."""
    limits = LIMITS | SEVERAL_GPUS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="everything tiny, on the CPU")
    parser.add_argument(
        "--only", nargs="+", choices=limits, default=list(limits), metavar="PART", help=", ".join(limits)
    )
    parser.add_argument("--redo", action="store_true", help="also parts that are done")
    parser.add_argument("--minutes", type=float, help=f"for all of it (default: {MINUTES}, with several GPUs 5 more)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu", metavar="DIR", help="of the report")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu_report", metavar="DIR", help="to work in")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments, limits)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace, limits: dict[str, int]) -> int:
    started = time.monotonic()
    cards = [] if arguments.tiny else find_cards()
    seconds = 60 * MINUTES + (SEVERAL_GPUS[ENGINES] if len(cards) != 1 else 0)
    if arguments.tiny:
        limits, seconds = {name: PATIENCE * limit for name, limit in limits.items()}, PATIENCE * seconds
    if arguments.minutes:
        seconds = 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    name = "cpu_tiny" if arguments.tiny else re.sub(r"\W+", "_", cards[0].lower()).strip("_")
    file = arguments.out / f"{name}_{date}.json"
    report = read(file) if file.exists() else new_report(cards, date, arguments.tiny)
    about = {name: about_part(name) for name in limits}
    commit = commit_here()
    for name in [name for name in limits if name in arguments.only]:
        before = report["parts"].get(name)
        if before is not None and before["status"] == "done" and not arguments.redo:
            print(f"{name}: done before", flush=True)
            continue
        left = seconds - (time.monotonic() - started)
        if limits[name] > left + 1:
            part: Part = before or {"status": "not run", "reason": "", "seconds": 0.0, "commit": commit, "cases": []}
            if part["status"] == "not run":
                part["reason"] = "no time left: give the command again"
        else:
            print(f"{name}: at most {limits[name]} s ...", end=" ", flush=True)
            part = run_part(name, arguments, limits[name], commit)
            print(f"{part['status']}, {part['seconds']:.0f} s", part["reason"], flush=True)
        report["parts"] = {
            n: part if n == name else report["parts"][n] for n in limits if n in report["parts"] or n == name
        }
        write(file, report, about)
    print(f"\n{file.with_suffix('.md')}")
    return int(any(report["parts"][name]["status"] == "failed" for name in arguments.only if name in report["parts"]))


def run_part(name: str, arguments: argparse.Namespace, limit: float, commit: str) -> Part:
    """Run one part in a process group of its own and end that group; its rows outlive whatever happens to it."""
    found = arguments.folder / f"{name}.jsonl"
    log = arguments.folder / f"{name}.log"
    found.unlink(missing_ok=True)
    started = time.monotonic()
    # CUDA wants fresh processes; in a dry run what parts import is imported once, and they are forked.
    context: Any = multiprocessing.get_context("fork" if arguments.tiny else "spawn")
    if arguments.tiny:
        import_module(f"gpu_parts.{name}")
    process = context.Process(target=in_process, args=(name, arguments.folder, arguments.tiny, limit, found, log))
    process.start()
    try:
        while process.is_alive() and not found.exists() and time.monotonic() < started + START:
            time.sleep(0.1)
        process.join(limit)
    finally:
        late = process.is_alive()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    rows = [parse_json(line, found, n) for n, line in enumerate(lines_of(found), 1)]
    ended = next((row for row in rows if "status" in row), None)
    if ended is None:
        reason = f"stopped after its {limit:g} s" if late else f"died with exit code {process.exitcode}; see {log}"
        ended = {"status": "failed", "reason": reason}
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if "status" not in row:
            cases[row["table"], row["case"]] = row
    return {
        "status": ended["status"],
        "reason": ended["reason"],
        "seconds": time.monotonic() - started,
        "commit": commit,
        "cases": list(cases.values()),
    }


def lines_of(file: Path) -> list[str]:
    """Whole lines: a part that was killed may have left half of one."""
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def in_process(name: str, folder: Path, tiny: bool, limit: float, found: Path, log: Path) -> None:
    """What the process of a part does: its rows go to `found`, line by line, all that is printed to `log`."""
    os.setpgid(0, 0)
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths)}
    if tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif name not in ("card", ENGINES):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

    def say(row: dict[str, Any]) -> None:
        with found.open("a") as stream:
            stream.write(json.dumps(row, default=str) + "\n")

    try:
        from gpu_parts.world import World

        cases = import_module(f"gpu_parts.{name}").cases
        found.touch()  # from now on time counts
        for row in cases(World(folder.resolve(), tiny, limit)):
            say(row)
        say({"status": "done", "reason": ""})
    except NotRun as reason:
        say({"status": "not run", "reason": str(reason)})
    except Exception as error:
        traceback.print_exc()
        say({"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"})


def find_cards() -> list[str]:
    """Names of the visible GPUs, asked for in another process, so that this one has nothing to do with CUDA.

    Raises:
        UserError: there is none.
    """
    names = "[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]"
    ask = f"import json, torch; print(json.dumps({names}))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    cards = json.loads(answer.stdout.splitlines()[-1]) if answer.returncode == 0 else []
    if not cards:
        raise UserError(f"no GPU that PyTorch can use {answer.stderr[-300:].strip()}(--tiny: a dry run on the CPU)")
    return list(cards)


def new_report(cards: list[str], date: str, tiny: bool) -> Report:
    if tiny:
        measured = f"A dry run on a CPU, {date}, with the tiny model: no number here is a measurement."
    else:
        names = " and ".join(f"{cards.count(card)} x {card}" for card in dict.fromkeys(cards))
        measured = (
            f"Measured on {names}, {date}, by `make gpu-report`: random weights of LLaVA-1.5-7B, "
            "4 x 700 tokens of which 576 are image; one GPU but where several are named."
        )
    return {"measured": measured, "cards": cards, "date": date, "tiny": tiny, "parts": {}}


def read(file: Path) -> Report:
    """The report of an earlier call of today on this card.

    Raises:
        UserError: it is damaged.
    """
    report: Report = read_checked(file, Report)
    return report


def write(file: Path, report: Report, about: dict[str, str]) -> None:
    write_atomically(file, (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), markdown(dict(report), about).encode())


def about_part(name: str) -> str:
    """The docstring of its module, which is not imported for it."""
    source = (Path(__file__).parent / "gpu_parts" / f"{name}.py").read_text()
    return ast.get_docstring(ast.parse(source)) or ""


def commit_here() -> str:
    """The short hash of the commit that is measured, with + where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout

    return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")


if __name__ == "__main__":
    sys.exit(main())
