"""Attacks on data: training files, official downloads, prepared folders, predictions, and the images of all of them."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_sculpt.artifacts.inference import Inference, load_for_inference
from llava_sculpt.cli import main
from llava_sculpt.data.dataset import validate_dataset
from llava_sculpt.evaluation import run
from llava_sculpt.evaluation.prepared import load_tasks
from llava_sculpt.records import file_sha256
from llava_sculpt.tasks import prepare_benchmark
from tests.attack.attack import break_file, fresh_copy, mutate_json_file, mutated, outcome
from tests.tasks.conftest import WRITERS

Tries = Iterator[random.Random]
NAMES = ["gqa", "okvqa", "iconqa"]


def digests(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def break_image(rng: random.Random, file: Path) -> str:
    """Damage an image, or put something else under its name."""
    kind = rng.choice(["file", "file", "black", "postscript", "huge", "format", "bomb"])
    if kind == "file":
        return break_file(rng, file)
    if kind == "black":
        with Image.open(file) as image:
            Image.new("RGB", image.size).save(file)
    elif kind == "postscript":
        file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print showpage\n")
    elif kind == "huge":
        Image.new("1", (1, rng.choice([13_377, 13_378, 1_000_000]))).save(file, "PNG")
    elif kind == "format":
        image_format = rng.choice(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "PCX", "ICO", "SGI"])
        Image.new("RGB", (4, 4), (9, 99, 200)).save(file, image_format)
    else:
        header = struct.pack(">IIBBBBB", rng.choice([0, 60_000, 2**31 - 1]), 60_000, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)))
    return f"{file.name}: {kind}"


def mutate_lines(rng: random.Random, file: Path) -> str:
    """Change one thing in one record of a JSON lines file, or the order or number of its lines."""
    lines = file.read_text(encoding="utf-8").splitlines()
    place = rng.randrange(len(lines))
    what = rng.randrange(5)
    change = "changed"
    if what == 0:
        lines.insert(place, rng.choice([lines[0], "{", "null", "[]", "\u2028", '{"question_id": [1], "text": 5}']))
    elif what == 1:
        del lines[place]
    else:
        record, change = mutated(rng, json.loads(lines[place]))
        lines[place] = json.dumps(record)
    file.write_text("\n".join(lines), encoding="utf-8")
    return f"{file.name}: line {place + 1}: {change}"


def damage(rng: random.Random, file: Path) -> str:
    if file.suffix == ".json":
        return rng.choice([break_file, mutate_json_file])(rng, file)
    if file.suffix == ".jsonl":
        return rng.choice([break_file, mutate_lines])(rng, file)
    return break_image(rng, file)


def any_file(rng: random.Random, folder: Path) -> Path:
    """Every kind of file as often as any other."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    suffix = rng.choice(sorted({file.suffix for file in files}))
    return rng.choice([file for file in files if file.suffix == suffix])


def test_training_data(
    tries: Tries, training_data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fingerprint(folder: Path) -> tuple[str, str]:
        return file_sha256(folder / "train.json"), validate_dataset(folder / "train.json", folder / "images").images

    untouched, before = fingerprint(training_data), digests(training_data)
    for rng in tries:
        folder = fresh_copy(training_data, tmp_path / "data")
        change = damage(rng, any_file(rng, folder))
        found = outcome(
            partial(
                main,
                [
                    "check-data",
                    f"{folder}/train.json",
                    "--image_folder",
                    f"{folder}/images",
                    "--model",
                    str(checkpoint),
                ],
            ),
            capsys,
        )
        assert found.code in (0, 2), (change, found)
        if found.code == 0 and digests(folder) != before:  # other data that is sound: known as other
            assert fingerprint(folder) != untouched, change


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for name in NAMES:
        WRITERS[name](folder / name)
    return folder


def test_official_files(tries: Tries, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {name: prepare_benchmark(name, raw / name, tmp_path / "known" / name) for name in NAMES}
    before = digests(raw)
    for number, rng in enumerate(tries):
        name, folder, out = rng.choice(NAMES), fresh_copy(raw, tmp_path / "now" / "raw"), tmp_path / "now" / f"{number}"
        change = damage(rng, any_file(rng, folder / name))
        found = outcome(partial(main, ["prepare", name, "--raw", f"{folder}/{name}", "--out", str(out)]), capsys)
        assert found.code in (0, 2), (change, found)
        if found.code == 2:
            assert not out.exists(), change
        elif any(file.endswith(".json") for file in digests(folder).items() ^ before.items() for file in file[:1]):
            manifest = json.loads((out / "manifest.json").read_text())
            unused = manifest["files"] == expected[name]["files"]
            assert unused or manifest != {**expected[name], "image_folder": manifest["image_folder"]}, change


def test_ones_own_task(tries: Tries, training_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = fresh_copy(training_data, tmp_path / "mine")
    for number in range(4):
        Image.new("RGB", (5, 5), (60 * number, 0, 0)).save(mine / "images" / f"test{number}.png")
    asked = [{"question_id": n, "image": f"test{n}.png", "text": "what ?"} for n in range(4)]
    (mine / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    (mine / "gold.json").write_text(json.dumps([{"question_id": n, "answer": "red"} for n in range(4)]))
    talk = [{"from": who, "value": said} for who, said in (("human", "<image>\na ?"), ("gpt", "b"))] * 2
    talk[2] = {"from": "human", "value": "and now ?"}
    (mine / "talk.json").write_text(json.dumps([{"image": f"test{n}.png", "conversations": talk} for n in range(4)]))

    def prepare(folder: Path, out: Path, kind: int) -> Callable[[], int]:
        words = ["prepare", "own", "--data", f"{folder}/train.json", "--images", f"{folder}/images", "--out", str(out)]
        further = ([], ["--test", f"{folder}/test.jsonl", "--answers", f"{folder}/gold.json", "--metric", "vqa"])
        return partial(main, [*words, *(*further, ["--test", f"{folder}/talk.json"])[kind]])

    expected = []
    for kind in range(3):
        assert outcome(prepare(mine, tmp_path / f"known{kind}", kind), capsys).code == 0
        expected.append(json.loads((tmp_path / f"known{kind}/manifest.json").read_text())["files"])
    before = digests(mine)
    for number, rng in enumerate(tries):
        folder, out, kind = fresh_copy(mine, tmp_path / "now"), tmp_path / "out" / f"own{number}", rng.randrange(3)
        change = damage(rng, any_file(rng, folder))
        found = outcome(prepare(folder, out, kind), capsys)
        assert found.code in (0, 2), (change, found)
        if found.code == 2:
            assert not out.exists(), change
            continue
        manifest = json.loads((out / "manifest.json").read_text())
        assert len(load_tasks([out.name], out.parent, "test")[0].questions) >= 2, change
        changed = {name for name, _ in digests(folder).items() ^ before.items()}
        if manifest["files"] != expected[kind]:  # other data that are sound
            assert changed & ({"train.json", "test.jsonl", "gold.json", "talk.json"} | {n for n in changed if "/" in n})


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Inference:
    return load_for_inference(str(checkpoint))


def answering(*parts: Any) -> Iterator[dict[int, str]]:
    """In place of a model: a short answer to each question."""
    for place, question in enumerate(parts[3]):
        yield {place: ("yes", "dog", "A")[len(question["text"]) % 3]}


def test_prepared_folders(
    tries: Tries, raw: Path, loaded: Inference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "generate_answers", answering)
    for name in NAMES:
        prepare_benchmark(name, raw / name, tmp_path / "world" / name, samples=2, val_samples=2)
        manifest = json.loads((tmp_path / "world" / name / "manifest.json").read_text())
        folder = tmp_path / "world" / name / manifest["image_folder"]
        fresh_copy(folder, tmp_path / "world" / "images" / name)
        manifest["image_folder"] = f"../images/{name}"
        (tmp_path / "world" / name / "manifest.json").write_text(json.dumps(manifest))

    def scored(folder: Path, number: object) -> Callable[[], int]:
        def call() -> int:
            tasks = load_tasks(NAMES, folder, "test")
            found.append(run.evaluate(loaded, tasks, tmp_path / f"out{number}", label="random"))
            return 0

        return call

    found: list[Any] = []
    assert outcome(scored(tmp_path / "world", "")).code == 0
    expected, before = found[0], digests(tmp_path / "world")
    for number, rng in enumerate(tries):
        folder = fresh_copy(tmp_path / "world", tmp_path / "now")
        change = damage(rng, any_file(rng, folder))
        told = outcome(scored(folder, number))
        changed = {name for name, _ in digests(folder).items() ^ before.items()}
        if told.code == 0 and any(name.partition("/")[2].startswith("test") for name in changed):
            raise AssertionError(f"questions or answers other than prepared were taken: {change}")
        if told.code == 0 and found[-1] != expected:  # as other images, or another manifest, they are known
            known = [found[-1][key] for key in ("config_hash", "inputs")]
            assert known != [expected[key] for key in ("config_hash", "inputs")], change
        if told.code == 2:
            assert not (tmp_path / f"out{number}" / "results.json").exists(), change


def test_prediction_files(
    tries: Tries, raw: Path, loaded: Inference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "files"
    for name in NAMES:
        prepare_benchmark(name, raw / name, tmp_path / "world" / name)
        (folder / name).mkdir(parents=True)
        for file in ("test.jsonl", "test_annotations.json"):
            (folder / name / file).write_bytes((tmp_path / "world" / name / file).read_bytes())
        questions = [json.loads(line) for line in (folder / name / "test.jsonl").read_text().splitlines()]
        answers = [{"question_id": q["question_id"], "text": "yes", "prompt": q["text"]} for q in questions]
        (folder / name / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    for rng in tries:
        now, name = fresh_copy(folder, tmp_path / "now"), rng.choice(NAMES)
        change = damage(rng, any_file(rng, now / name))
        files = [f"--predictions={now}/{name}/answers.jsonl", f"--annotations={now}/{name}/test_annotations.json"]
        more = rng.choice([[], ["--lenient"], [f"--questions={now}/{name}/test.jsonl"], [f"--per_item={tmp_path}/i"]])
        found = outcome(partial(main, ["score", name, *files, *more]), capsys)
        assert found.code in (0, 2), (change, found)
