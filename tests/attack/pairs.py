"""Two commands started at once on one folder: `python -m tests.attack.pairs`.

Each refuses in one line or does what it does alone; one of them at least is done; what is there then is what the two
leave when one follows the other.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.attack.kills import differences
from tests.attack.stage import COMMANDS, Command, Stage, files_of


def _other(name: str, before: str, after: str) -> Command:
    command = COMMANDS[name]
    words = [after if word == before else word for word in command.words]
    return Command(words, (), prepare=command.prepare, only_fresh=command.only_fresh)


def _put_run(stage: Stage) -> None:
    shutil.copytree(stage.need("run"), stage.work / "run")


_EVAL_HERE = Command(
    "eval --model run --tasks iconqa,textvqa --data_root ../tasks --split val --output_dir scores".split(),
    (),
    prepare=_put_run,
)
_EVAL_OUT = Command(
    "eval --model out --tasks iconqa,textvqa --data_root ../tasks --split val --output_dir scores".split(), ()
)
PAIRS: dict[str, tuple[Command, Command]] = {
    "train, train": (COMMANDS["train"], COMMANDS["train"]),
    "train, train otherwise": (COMMANDS["train"], _other("train", "5e-3", "4e-3")),
    "train, eval": (COMMANDS["train"], _EVAL_OUT),
    "eval, eval": (COMMANDS["eval"], COMMANDS["eval"]),
    "eval, eval of another": (COMMANDS["eval"], _other("eval", "../run", "../lora")),
    "eval, merge": (_EVAL_HERE, Command("merge run --out out".split(), ())),
    "merge, merge": (COMMANDS["merge"], COMMANDS["merge"]),
    "merge, merge of another": (COMMANDS["merge"], _other("merge", "../run", "../lora")),
    "export, export": (COMMANDS["export sparse"], COMMANDS["export sparse"]),
    "export, export otherwise": (COMMANDS["export sparse"], COMMANDS["export delta"]),
    "convert, convert": (COMMANDS["convert checkpoint"], COMMANDS["convert checkpoint"]),
    "edit, edit": (COMMANDS["edit"], _other("edit", "0.5", "0.4")),
    "prepare, prepare": (COMMANDS["prepare"], COMMANDS["prepare"]),
    "experiment, experiment": (COMMANDS["experiment"], COMMANDS["experiment"]),
}
_SELDOM = "experiment, experiment"  # a minute each


class Pairs:
    """Pairs of commands on a stage, each reproducible by the seed and its number (as far as the machine lets it)."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.seed = stage, seed
        self._after: dict[str, list[tuple[list[int], dict[str, str]]]] = {}
        self._seconds: dict[str, float] = {}

    def one_by_one(self, name: str) -> list[tuple[list[int], dict[str, str]]]:
        """Exit codes (2 for who has not run) and files after either command alone, and after both in either order."""
        if name not in self._after:
            same = PAIRS[name][0] is PAIRS[name][1]
            orders: list[tuple[int, ...]] = [(0,), (0, 1)] if same else [(0,), (0, 1), (1,), (1, 0)]
            self._after[name] = [self._alone(name, order) for order in orders]
            if same:
                self._after[name] += [(codes[::-1], files) for codes, files in self._after[name]]
        return self._after[name]

    def _alone(self, name: str, order: tuple[int, ...]) -> tuple[list[int], dict[str, str]]:
        self._begin(name)
        codes = [2, 2]
        for which in order:
            started = time.monotonic()
            command = PAIRS[name][which]
            running = self.stage.start(command.words, new=command.only_fresh)
            codes[which] = running.wait()
            assert codes[which] in (0, 2), running.output()
            self._seconds[name] = max(self._seconds.get(name, 0), time.monotonic() - started)
        return codes, files_of(self.stage.work)

    def start(self, name: str, number: int) -> tuple[str, list[str]]:
        """One pair; what was done, and what was wrong then."""
        rng = random.Random(f"{self.seed}/{name}/{number}")
        after = self.one_by_one(name)
        self._begin(name)
        order = rng.choice([(0, 1), (1, 0)])
        # Most often so short that both are at the same thing.
        delay = rng.choice([0.0, rng.uniform(0, 0.1), rng.uniform(0, self._seconds[name])])
        running = {}
        for which in order:
            command = PAIRS[name][which]
            running[which] = self.stage.start(command.words, new=command.only_fresh)
            if which == order[0]:
                time.sleep(delay)
        codes = [running[0].wait(), running[1].wait()]
        return f"order {order}, {delay:.3f} s apart, ended with {codes}", [
            *(f"{running[n].output()[-2000:]}" for n in (0, 1) if not _in_order(codes[n], running[n].output())),
            *self._wrong_end(codes, after),
        ]

    def _wrong_end(self, codes: list[int], after: list[tuple[list[int], dict[str, str]]]) -> Iterator[str]:
        if 0 not in codes:
            yield "neither was done"
            return
        found = files_of(self.stage.work)
        allowed = [files for right, files in after if right == codes]
        if found not in allowed:
            best = min(allowed or [files for _, files in after], key=lambda files: len(found.items() ^ files.items()))
            yield from differences(found, best)
            if not allowed:
                yield "one after the other they never end so"

    def _begin(self, name: str) -> None:
        for command in reversed(PAIRS[name]):  # the first one's inputs stay
            self.stage.begin(command)


def _in_order(code: int, output: str) -> bool:
    errors = sum(line.startswith("error: ") for line in output.splitlines())
    return "Traceback" not in output and (code == 0 or (code == 2 and errors == 1))


def main() -> int:
    parser = argparse.ArgumentParser(description="Start two commands at once on one folder.")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of pair")
    options = parser.parse_args()
    names = [options.only] if options.only else [*(name for name in PAIRS if name != _SELDOM)] * 4 + [_SELDOM]
    failed = done = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as root, Stage(Path(root)) as stage, suppress(KeyboardInterrupt):
        pairs = Pairs(stage, options.seed)
        for number in range(options.pairs):
            name = names[number % len(names)]
            what, problems = pairs.start(name, number)
            done += 1
            if problems:
                failed += 1
                print(f"FAILED {name} {number}, {what}", *problems, sep="\n    ", flush=True)
            else:
                print(f"{done:4} {what}", flush=True)
    print(f"{done} pairs, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
