"""The place where commands are attacked: inputs made once, a working folder that is made anew for each attack."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.attack.forks import Forks, Running, fresh
from tests.conftest import make_checkpoint, make_flags, make_tiny_data, make_training_data
from tests.experiments.conftest import make_study, with_data, write_grid
from tests.runs import DEEPSPEED, ROOT, free_port, zero

# Of JSON files: what differs between two runs that are the same.
_TIMES = {
    *("seconds", "train_seconds", "finished", "peak_memory_bytes", "versions"),
    "train_loss",  # in trainer_state.json: the mean since the last start
    *("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second"),
    "trainer_state.json",  # in complete.json, with its size or hash: it holds times
}
ENTRIES: list[dict[str, object]] = [
    {"method": "zero_shot"},
    {"method": ["lora", "sculpt"], "task": "iconqa"},
    {"method": "post_prune", "task": "iconqa", "density": 0.3},
]


@dataclass
class Command:
    """What is attacked.

    Args:
        words: of `llava-sculpt`; relative paths start in the working folder, beside which the inputs are.
        whole: file patterns; a file that is found is taken for a result, and so has to be one.
        readers: commands that take the output (`{}`: a folder with an adapter in it).
        prepare: puts inputs that it writes into, into the working folder.
        processes: how many are launched, by DeepSpeed.
    """

    words: list[str]
    whole: tuple[str, ...]
    readers: tuple[str, ...] = ()
    prepare: Callable[[Stage], None] = field(default=lambda stage: None)
    processes: int = 1
    only_fresh: bool = False


def _train_words(**more: str) -> list[str]:
    flags = make_flags(Path("../base"), Path("../data")) | {"save_steps": "3", "output_dir": "out"} | more
    return ["train", *(word for key, value in flags.items() for word in (f"--{key}", value))]


_READERS = ("inspect {} --json", "merge {} --out ../read")
COMMANDS: dict[str, Command] = {
    "train": Command(_train_words(), (), _READERS),
    "eval": Command(
        "eval --model ../run --tasks iconqa,textvqa,coco --data_root ../tasks --split val --batch_size 1 "
        "--max_new_tokens 12 --output_dir out".split(),
        ("out/results.json", "out/predictions/*.json"),
    ),
    "merge": Command("merge ../run --out out".split(), ("out/*",)),
    "convert checkpoint": Command("convert checkpoint ../base --to original --out out".split(), ("out/*",)),
    "convert adapter": Command(
        "convert adapter ../run --to original --base ../original --out llava-lora".split(), ("llava-lora/*",)
    ),
    "export sparse": Command("export ../run --format sparse --out out.safetensors".split(), ("out.safetensors",)),
    "export delta": Command("export ../run --format delta --out out.safetensors".split(), ("out.safetensors",)),
    "export dense": Command("export ../sparse.safetensors --format dense --out out".split(), ("out/*",)),
    "edit": Command("edit dare --adapter ../lora --drop 0.5 --seed 1 --out out".split(), ("out/*",)),
    "prepare": Command(
        "prepare iconqa --raw ../tasks/raw/iconqa --out prepared/iconqa".split(), ("prepared/iconqa/*.json*",)
    ),
    "experiment": Command(
        "experiment mini --scale tiny --jobs 2".split(),
        ("results/tiny/runs/*",),
        prepare=lambda stage: shutil.copytree(stage.need("study"), stage.work, symlinks=True, dirs_exist_ok=True),
        only_fresh=True,
    ),
    "train on two": Command(
        _train_words(**zero("zero2"), per_device_train_batch_size="2", lora_dropout="0"),
        (),
        _READERS,
        processes=2,
        only_fresh=True,
    ),
}
_INPUTS = {
    "run": _train_words(output_dir="../run", save_total_limit="100"),
    "lora": _train_words(output_dir="../lora", method="lora"),
    "original": "convert checkpoint ../base --to original --out ../original".split(),
    "sparse.safetensors": "export ../run --format sparse --out ../sparse.safetensors".split(),
}


class Stage:
    """Inputs in `root`, the working folder in `root`/work; a context that ends its processes."""

    def __init__(self, root: Path) -> None:
        self.root, self.work = root.resolve(), root.resolve() / "work"
        self._outputs = itertools.count()

    def __enter__(self) -> Stage:
        self._forks = Forks().__enter__()
        self.import_seconds = self._forks.import_seconds
        (self.root / "output").mkdir()
        self.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._forks.__exit__(*error)

    def clear(self) -> None:
        """A new working folder, empty."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def begin(self, command: Command) -> None:
        """A new working folder for a command, with its inputs in and beside it."""
        self.clear()
        for word in command.words:
            if word.startswith("../"):
                self.need(word.split("/")[1])
        command.prepare(self)

    def need(self, name: str) -> Path:
        """An input in `root`, made at first use."""
        place = self.root / name
        if place.exists():
            return place
        makers: dict[str, Callable[[Path], object]] = {
            "base": make_checkpoint,
            "data": make_training_data,
            "tasks": make_tiny_data,
            "study": self._make_study,
        }
        if name in makers:
            makers[name](place)
        else:
            for other in ("base", "data") + (("run",) if name == "sparse.safetensors" else ()):
                self.need(other)
            running = self.start(_INPUTS[name])
            assert running.wait() == 0, running.output()
        return place

    def _make_study(self, place: Path) -> None:
        study = with_data(make_study(place), self.need("tasks"), self.need("base"))
        write_grid(study, "mini", ENTRIES)

    def start(
        self, words: list[str], environment: dict[str, str] | None = None, processes: int = 1, new: bool = False
    ) -> Running:
        """Start a command in the working folder.

        Args:
            new: with a new interpreter.
        """
        output = self.root / "output" / f"{next(self._outputs)}.txt"
        if processes > 1:
            launcher = [*DEEPSPEED, "--master_port", str(free_port()), str(ROOT / "llava_sculpt/train/train.py")]
            return fresh([*launcher, *words[1:]], self.work, output, environment or {})
        if new:
            command = [sys.executable, "-m", "llava_sculpt.cli", *words]
            return fresh(command, self.work, output, environment or {})
        return self._forks.start(words, self.work, output, environment or {})


def files_of(folder: Path) -> dict[str, str]:
    """What is in a folder: path -> hash of the content, without times and what is printed; "" for folders and links."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(place, name), folder)] = ""
        for name in names:
            path = Path(place, name)
            if path.is_symlink() or path.suffix in (".log", ".lock"):
                found[str(path.relative_to(folder))] = ""
            else:
                found[str(path.relative_to(folder))] = content_hash(path)
    return found


def content_hash(file: Path) -> str:
    """sha256 of a file; of JSON without times."""
    content = file.read_bytes()
    if file.suffix == ".json":
        with suppress(ValueError):  # half written, in a place where nobody takes it for whole
            content = json.dumps(_without_times(json.loads(content)), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in _TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value
