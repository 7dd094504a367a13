"""Commands killed at file-system events and at random moments: `python -m tests.attack.kills`.

After a kill nothing half done is taken for a result; the same command again ends with what an undisturbed one makes, to
the bit; and nothing is left lying about.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llava_sculpt.locks import is_leftover
from tests.attack.stage import COMMANDS, Command, Stage, files_of

# How many of a hundred kills.
SHARES = {
    "train": 32,
    "eval": 16,
    "merge": 7,
    "convert checkpoint": 6,
    "convert adapter": 5,
    "export sparse": 4,
    "export delta": 4,
    "export dense": 4,
    "edit": 5,
    "prepare": 6,
    "experiment": 6,
    "train on two": 5,
}


@dataclass
class Undisturbed:
    """What a command makes and takes when nothing happens."""

    files: dict[str, str]
    events: list[str]
    seconds: float


class Kills:
    """Kills of the commands of a stage, each reproducible by the seed and its number."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.seed = stage, seed
        self._undisturbed: dict[str, Undisturbed] = {}

    def undisturbed(self, name: str) -> Undisturbed:
        """What a command does when it is left alone; done once."""
        if name not in self._undisturbed:
            command, log = COMMANDS[name], self.stage.root / "events.txt"
            log.unlink(missing_ok=True)
            self.stage.begin(command)
            started = time.monotonic()
            environment = {"ATTACK_FOLDER": str(self.stage.work), "ATTACK_LOG": str(log)}
            running = self.stage.start(command.words, environment, command.processes, command.only_fresh)
            assert running.wait() == 0, running.output()
            seconds = time.monotonic() - started
            self._undisturbed[name] = Undisturbed(files_of(self.stage.work), log.read_text().splitlines(), seconds)
        return self._undisturbed[name]

    def kill(self, name: str, number: int, at_event: bool) -> tuple[str, list[str]]:
        """One kill (or two, one after the other); what was done, and what was wrong then."""
        rng = random.Random(f"{self.seed}/{name}/{number}/{at_event}")
        command = COMMANDS[name]
        new = command.only_fresh or rng.random() < 0.1
        before = self.undisturbed(name)
        self.stage.begin(command)
        done, problems = [], []
        seconds = before.seconds + (self.stage.import_seconds if new and not command.only_fresh else 0)
        for _ in range(1 if rng.random() < 0.8 else 2):
            if at_event:
                what, environment = self._event(rng, before, command)
            else:
                after = rng.uniform(0, seconds)
                what, environment = f"after {after:.2f} of {seconds:.2f} s", {}
            running = self.stage.start(command.words, environment, command.processes, new)
            if not at_event:
                time.sleep(after)
                running.kill(group=rng.random() < 0.7)
            code = running.wait()
            done.append(f"{what} (ended with {code})")
            # A launcher or a runner whose process is killed fails in its own way.
            if not (command.only_fresh or code in (0, -9, -14) or _is_there(code, running.output())):
                problems.append(f"the killed command ended with {code}: {running.output()[-2000:]}")
            problems += self._half_results(command, before)
        running = self.stage.start(command.words, {}, command.processes, new)
        code = running.wait()
        if code != 0 and not _is_there(code, running.output()):
            problems.append(f"the same command again ended with {code}: {running.output()[-2000:]}")
        else:
            problems += differences(files_of(self.stage.work), before.files)
        return f"{'new' if new else 'forked'} process killed " + ", then ".join(done), problems

    def _event(self, rng: random.Random, before: Undisturbed, command: Command) -> tuple[str, dict[str, str]]:
        rank, at, event = rng.choice(before.events).split(" ", 2)
        how = rng.choice(["process", "group", f"{rng.uniform(0.0002, 0.01):.4f}"])
        environment = {"ATTACK_FOLDER": str(self.stage.work), "ATTACK_AT": at, "ATTACK_HOW": how}
        if command.processes > 1:
            environment["ATTACK_RANK"] = rank
        return f"at event {at} of rank {rank}: {event}, {how}", environment

    def _half_results(self, command: Command, before: Undisturbed) -> Iterator[str]:
        """What is taken for a result, and is none."""
        work = self.stage.work
        now = files_of(work) if any(work.iterdir()) else {}
        for pattern in command.whole:
            for file in work.glob(pattern):
                name = str(file.relative_to(work))
                if now[name] != before.files.get(name) and not is_leftover(file):
                    yield f"{name} is there, and is not what it has to be"
            if pattern.endswith("/*") and any(work.glob(pattern)) and command.words[0] != "experiment":
                part = pattern.removesuffix("*")
                yield from (
                    f"{part} is there, without {n}" for n in before.files if n.startswith(part) and n not in now
                )
        for adapter in sorted(work.glob("out")) + sorted(work.glob("out/checkpoint-*")):
            for reader in command.readers:
                shutil.rmtree(self.stage.root / "read", ignore_errors=True)
                words = reader.format(adapter.relative_to(work)).split()
                running = self.stage.start(words)
                code, output = running.wait(), running.output()
                if code == 0:
                    found, whole = files_of(adapter), self._weights(adapter, command, before)
                    wrong = [name for name, right in whole if found.get(name) != right]
                    if wrong:
                        yield f"`{' '.join(words)}` takes a folder whose {', '.join(wrong)} are missing or others"
                elif code != 2 or "Traceback" in output or "error: " not in output:
                    yield f"`{' '.join(words)}` ended with {code}: {output[-2000:]}"

    def _weights(self, adapter: Path, command: Command, before: Undisturbed) -> Iterator[tuple[str, str]]:
        """Names and hashes of the weight files that an adapter's folder has to hold, as far as is known."""
        place = adapter.relative_to(self.stage.work)
        if command.processes > 1:
            right = {name.removeprefix("out/"): value for name, value in before.files.items() if place == Path("out")}
        else:  # whose checkpoints are all there
            right = files_of(self.stage.need("run") / place.relative_to("out"))
        return ((name, value) for name, value in right.items() if name.endswith(".safetensors") and "/" not in name)


def _is_there(code: int, output: str) -> bool:
    """Whether a command was refused because an earlier one has come to its end before it was killed."""
    return code == 2 and ": exists" in output


def differences(found: dict[str, str], right: dict[str, str]) -> Iterator[str]:
    """What differs between the files of two folders."""
    if missing := sorted(right.keys() - found.keys()):
        yield f"missing at the end: {', '.join(missing)}"
    if litter := sorted(found.keys() - right.keys()):
        yield f"litter: {', '.join(litter)}"
    if wrong := sorted(name for name in found.keys() & right.keys() if found[name] != right[name]):
        yield f"another content: {', '.join(wrong)}"


def plan(events: int, moments: int, names: Sequence[str]) -> list[tuple[str, int, bool]]:
    """Which command, the number of its kill, whether at an event: shared out by `SHARES`."""
    chosen = []
    for wanted, at_event in ((events, True), (moments, False)):
        total, before = sum(SHARES[name] for name in names), 0
        for name in names:
            upto = before + SHARES[name]
            count = wanted * upto // total - wanted * before // total
            chosen += [(name, number, at_event) for number in range(count)]
            before = upto
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill commands at file-system events and at random moments.")
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--random", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SHARES), help="commands, with commas between")
    parser.add_argument("--number", type=int, help="of each command this kill alone: repeat a failed one")
    options = parser.parse_args()
    failed: Counter[str] = Counter()
    done: Counter[str] = Counter()
    chosen = plan(options.events, options.random, options.only.split(","))
    random.Random(options.seed).shuffle(chosen)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as root, Stage(Path(root)) as stage, suppress(KeyboardInterrupt):
        kills = Kills(stage, options.seed)
        for name, number, at_event in chosen:
            if options.number not in (None, number):
                continue
            what, problems = kills.kill(name, number, at_event)
            done[name] += 1
            if problems:
                failed[name] += 1
                print(f"FAILED {name} {number}, {what}", *problems, sep="\n    ", flush=True)
            else:
                print(f"{sum(done.values()):4} {name}: {what}", flush=True)
    print("\n".join(f"{name}: {count} kills, {failed[name]} failed" for name, count in done.items()))
    print(f"{sum(done.values())} kills, {sum(failed.values())} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
