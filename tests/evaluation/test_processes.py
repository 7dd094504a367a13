"""Evaluation by several processes: the same predictions for any number of them, also after kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.journal import answer_record
from llava_sculpt.evaluation.processes import share_out
from llava_sculpt.experiments import finetune
from llava_sculpt.experiments.tiny_data import prepare_tiny_world
from tests.evaluation.conftest import first_questions

ROOT = Path(__file__).parents[2]
TINY = ROOT / "data" / "tiny_llava"


@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9)), max_size=80),
    shares=st.integers(1, 5),
)
def test_every_question_has_one_process_and_loads_are_even(lengths, shares):
    images = [f"{image}.png" if image else None for _, image in lengths]
    tokens = [length for length, _ in lengths]
    result = share_out(tokens, images, 576, shares)
    assert sorted(place for share in result for place in share) == list(range(len(lengths)))
    owners = {}
    for number, share in enumerate(result):
        for place in share:
            owners.setdefault(images[place], set()).add(number)
    if len(lengths) <= 32:  # below, an image is never cut
        assert all(len(owner) == 1 for image, owner in owners.items() if image)
    loads = [sum(tokens[p] for p in share) + 576 * len({images[p] for p in share if images[p]}) for share in result]
    # The most loaded process has at most one group more than the least loaded one.
    assert max(loads) - min(loads) <= 32 * 300 + 2 * 576


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    prepare_tiny_world(root)
    return root


def command(data: Path, out: Path, *flags: str) -> list[str]:
    base = ["eval", "--model", str(TINY), "--data_root", str(data), "--output_dir", str(out)]
    return ["-m", "llava_sculpt.cli", *base, *flags]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def data(tiny_world, tmp_path_factory) -> Path:
    return first_questions(tiny_world, tmp_path_factory.mktemp("data"), {"gqa": 40, "iconqa": 30})


@pytest.fixture(scope="session")
def alone(data, tmp_path_factory) -> Path:
    """The evaluation by one process, one question at a time."""
    out = tmp_path_factory.mktemp("alone")
    done = run(*command(data, out, "--tasks", "gqa,iconqa", "--batch_size", "1"))
    assert done.returncode == 0, done.stderr
    return out


def assert_same(out: Path, expected: Path) -> None:
    for task in ("gqa", "iconqa"):
        assert (out / f"predictions/{task}.jsonl").read_bytes() == (expected / f"predictions/{task}.jsonl").read_bytes()
    assert (out / "results.json").read_bytes() == (expected / "results.json").read_bytes()
    assert sorted(path.name for path in (out / "predictions").iterdir()) == ["gqa.jsonl", "iconqa.jsonl"]


@pytest.mark.slow
def test_gpus_starts_processes_that_share_the_questions(data, alone, tmp_path):
    done = run(*command(data, tmp_path, "--tasks", "gqa,iconqa", "--batch_size", "16", "--gpus", "2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results:") == 1
    assert_same(tmp_path, alone)


def test_finetune_evaluates_on_all_gpus(data, alone, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(finetune, "gpu_count", lambda: 2)
    out = tmp_path / "out"
    results = finetune.evaluate_model(str(TINY), out, ["gqa", "iconqa"], "paper", str(TINY))
    assert_same(out, alone)
    assert results == json.loads((out / "results.json").read_text())
    monkeypatch.setattr(finetune, "launch", lambda *_: 2)
    with pytest.raises(UserError, match=r"one of 2 processes ended with exit code 2"):
        finetune.evaluate_model(str(TINY), out, ["gqa"], "paper", "lost")


@pytest.mark.slow
def test_torchrun_does_the_same(data, alone, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*torchrun, *command(data, tmp_path, "--tasks", "gqa,iconqa", "--batch_size", "7"))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, alone)


def test_killed_it_continues_with_another_number_of_processes(data, alone, tmp_path):
    flags = ["--tasks", "gqa,iconqa", "--batch_size", "2"]
    process = subprocess.Popen(
        [sys.executable, *command(data, tmp_path, *flags, "--gpus", "2")],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    written = 0
    deadline = time.monotonic() + 120
    while written < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        written = sum(part.read_bytes().count(b"\n") for part in tmp_path.glob("predictions/*.part*.jsonl"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    parts = list(tmp_path.glob("predictions/gqa.part*.jsonl"))
    assert parts and not (tmp_path / "results.json").exists()
    # What was answered is taken as it is: a mark put into one record comes out in the predictions.
    lines = parts[0].read_text().splitlines()
    record = json.loads(lines[1])
    parts[0].write_text(
        "\n".join([lines[0], json.dumps(answer_record(record["question_id"], "marked")), *lines[2:]]) + '\n{"torn'
    )
    done = run(*command(data, tmp_path, "--tasks", "gqa,iconqa", "--batch_size", "16"))
    assert done.returncode == 0, done.stderr
    predictions = [json.loads(line) for line in (tmp_path / "predictions/gqa.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (alone / "predictions/gqa.jsonl").read_text().splitlines()]
    differing = [p["question_id"] for p, e in zip(predictions, expected, strict=True) if p != e]
    assert differing == [record["question_id"]]
    assert (tmp_path / "predictions/iconqa.jsonl").read_bytes() == (alone / "predictions/iconqa.jsonl").read_bytes()
    assert not list(tmp_path.glob("predictions/*.part*"))


def test_bad_input_is_told_once_whoever_finds_it(data, tmp_path):
    done = run(*command(data, tmp_path / "out", "--tasks", "gqa,okvqa", "--gpus", "2"))
    assert done.returncode == 2
    assert done.stderr.count("okvqa is not prepared") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_broken_image_ends_all_processes(data, tmp_path):
    broken = tmp_path / "data"
    (broken / "gqa").mkdir(parents=True)
    for file in (data / "gqa").iterdir():
        (broken / "gqa" / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((broken / "gqa/manifest.json").read_text())
    (broken / "images").symlink_to(manifest["image_folder"])
    lines = [json.loads(line) for line in (broken / "gqa/test.jsonl").read_text().splitlines()]
    images = broken / "pictures"
    images.mkdir()
    for line in lines:
        target = images / line["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((Path(manifest["image_folder"]) / line["image"]).read_bytes())
    (images / lines[3]["image"]).write_bytes(b"no image")
    (broken / "gqa/manifest.json").write_text(json.dumps({**manifest, "image_folder": str(images)}))
    done = run(*command(broken, tmp_path / "out", "--tasks", "gqa", "--gpus", "2"))
    assert done.returncode == 2
    assert done.stderr.count("not an image") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/predictions/gqa.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_questions_whatever_batch_and_processes(tiny_world, tmp_path):
    tasks = {"coco": 300, "gqa": 300, "iconqa": 200, "ocrvqa": 200}
    data = first_questions(tiny_world, tmp_path / "data", tasks)
    found = {}
    for batch_size, processes in ((64, 2), (64, 1), (7, 1), (1, 1)):
        out = tmp_path / f"{batch_size}_{processes}"
        flags = ["--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--gpus", str(processes)]
        done = run(*command(data, out, *flags))
        assert done.returncode == 0, done.stderr
        found[batch_size, processes] = [(out / f"predictions/{task}.jsonl").read_bytes() for task in tasks]
    assert sum(len(file.splitlines()) for file in found[1, 1]) == 1000
    for setting, files in found.items():
        assert files == found[1, 1], setting
