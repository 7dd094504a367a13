"""A run that was cut off, and what it continues from made wrong: refused, or the result is the right one to the bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attack.attack import break_file, fresh_copy, mutate_json_file, outcome
from tests.runs import Train, cut_off_after, same_files

STEP = 15  # of 18; the masks are made at 5


class Cut:
    """A run cut off behind a checkpoint, with a base model and data of its own."""

    def __init__(self, root: Path, train: Train, flags: dict[str, str]) -> None:
        self.root, self._train = root, train
        shutil.copytree(flags["model_name_or_path"], root / "sound" / "base")
        shutil.copytree(Path(flags["data_path"]).parent, root / "sound" / "data")
        self.restore()
        assert self.train(root / "whole", save_steps=1, save_total_limit=100) == 0
        cut_off_after(STEP, root / "whole", root / "cut")

    def train(self, folder: Path, **options: object) -> int:
        data = self.root / "data"
        paths = {"data_path": data / "train.json", "image_folder": data / "images"}
        return self._train(folder, model_name_or_path=self.root / "base", **paths, **options)

    def restore(self) -> None:
        for name in ("base", "data"):
            fresh_copy(self.root / "sound" / name, self.root / name)


@pytest.fixture(scope="module")
def cut(train: Train, flags: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return Cut(tmp_path_factory.mktemp("cut"), train, flags)


def of_checkpoint(rng: random.Random, run: Path, cut: Cut) -> str:
    file = rng.choice(sorted((run / f"checkpoint-{STEP}").iterdir()))
    kind = rng.randrange(4)
    if kind == 0:
        file.with_name(rng.choice(["optimizer.bin", "connector.safetensors.old", "x.json"])).write_bytes(b"x" * 9)
        return "a file more"
    if kind == 1:
        shutil.copy(cut.root / "whole" / f"checkpoint-{rng.choice([STEP - 1, STEP + 1, 3])}" / "optimizer.pt", file)
        return f"{file.name} is another checkpoint's optimizer.pt"
    if kind == 2:
        other = cut.root / "whole" / f"checkpoint-{STEP - 1}" / file.name
        shutil.copy(other, file)
        return f"{file.name} is that of the step before"
    return damaged(rng, file)


def of_run(rng: random.Random, run: Path, cut: Cut) -> str:
    return damaged(rng, run / "run.json")


def of_inputs(rng: random.Random, run: Path, cut: Cut) -> str:
    places = [cut.root / "base", cut.root / "data", cut.root / "data" / "images"]
    return damaged(rng, rng.choice([file for file in sorted(rng.choice(places).iterdir()) if file.is_file()]))


def of_place(rng: random.Random, run: Path, cut: Cut) -> str:
    """Checkpoints of other steps, names and kinds."""
    checkpoint = run / f"checkpoint-{STEP}"
    names = ["checkpoint-17", "checkpoint-3", "checkpoint-0015", "checkpoint-1\u00b2", "checkpoint-x", ".saving"]
    name = rng.choice(names)
    if rng.random() < 0.3:
        shutil.copytree(checkpoint, run / name, dirs_exist_ok=True)
        return f"{name} beside it"
    if rng.random() < 0.3:
        (run / name).write_bytes(b"") if name != ".saving" else None
        return f"{name} is a file"
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    checkpoint.rename(run / name)
    return f"renamed {name}"


def damaged(rng: random.Random, file: Path) -> str:
    if file.suffix == ".json" and rng.random() < 0.6:
        return mutate_json_file(rng, file)
    return break_file(rng, file)


Attack = Callable[[random.Random, Path, Cut], str]
ATTACKS: list[Attack] = [of_checkpoint, of_checkpoint, of_run, of_inputs, of_place]


def test_resuming(cut: Cut, tries: Iterator[random.Random], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rng in tries:
        cut.restore()
        run = fresh_copy(cut.root / "cut", tmp_path / "run")
        change = rng.choice(ATTACKS)(rng, run, cut)
        result = outcome(lambda: cut.train(tmp_path / "run"), capsys)
        assert result.code in (0, 2), (change, result)
        if result.code == 0:
            assert same_files(run, cut.root / "whole"), change
            assert json.loads((run / "run.json").read_text())["status"] == "finished", change
        assert "weights_only" not in str(result.lines), (change, result)
