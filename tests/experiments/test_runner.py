"""`experiment` in real processes: killed or interrupted at any moment, it ends with an undisturbed run's results."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llava_sculpt.experiments.grid import read_grid
from llava_sculpt.experiments.jobs import adapter_folder
from tests.experiments.conftest import kill, make_study, results_of, start, wait_for, with_data, write_grid

pytestmark = pytest.mark.gpu

ENTRIES: list[dict[str, object]] = [
    {"method": "zero_shot"},
    {"method": ["lora", "sculpt"], "task": "iconqa"},
    {"method": "dare", "task": "iconqa", "drop": 0.5},
    {"method": "model_tailor", "task": "iconqa", "keep": 0.2, "samples": 6},
    {"method": "post_prune", "task": "iconqa", "density": 0.3},
]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, checkpoint: Path
) -> tuple[dict[str, str], float]:
    """Results of one run from start to end, and the seconds it took."""
    study = with_data(make_study(tmp_path_factory.mktemp("undisturbed") / "study"), tiny_data, checkpoint)
    write_grid(study, "mini", ENTRIES)
    started = time.monotonic()
    process = start(study, "mini")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "6 jobs done" in output and "LoRASculpt" in output
    return results_of(study), time.monotonic() - started


def test_results_are_whole(undisturbed: tuple[dict[str, str], float]) -> None:
    results = {name: json.loads(text) for name, text in undisturbed[0].items()}
    by_method = {content["run"]["method"]: content for content in results.values()}
    assert set(by_method) == {"zero_shot", "lora", "sculpt", "dare", "model_tailor", "post_prune"}
    lora = by_method["lora"]
    for method in ("dare", "model_tailor", "post_prune"):
        assert by_method[method]["config"] == lora["config"] and by_method[method]["run"]["parent"]
        assert by_method[method]["run"]["edit"]
        assert (by_method[method]["base"], by_method[method]["data"]) == (lora["base"], lora["data"])
    assert by_method["post_prune"]["densities"]["total"][0] == pytest.approx(0.3, abs=0.02)
    assert set(by_method["zero_shot"]["scores"]) == {"iconqa", "coco"}
    sculpt = by_method["sculpt"]
    assert set(sculpt["scores"]) == {"iconqa"} and set(sculpt["tasks"]) == {
        "iconqa",
        "okvqa",
        "ocrvqa",
        "gqa",
        "textvqa",
    }
    assert sculpt["curve"]["step"] == [2, 4, 6, 8] and len(sculpt["curve"]["cmr_llm"]) == 4
    assert sculpt["config"]["learning_rate"] == 1e-3 and sculpt["config"]["lora_r"] == 4
    for density_A, density_B, density_BA, bound in sculpt["densities"]["modules"].values():
        assert density_A <= 0.1 and density_B <= 0.1 and density_BA > 0 and 0 < bound < 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_again_and_again(live_study: Path, undisturbed: tuple[dict[str, str], float]) -> None:
    """SIGKILL at random moments of the time that the whole takes (more of them: `make attack`)."""
    expected, seconds = undisturbed
    write_grid(live_study, "mini", ENTRIES)
    rng = random.Random(1)
    for _ in range(8):
        process = start(live_study, "mini")
        try:
            process.communicate(timeout=rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            kill(process)
    process = start(live_study, "mini")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert results_of(live_study) == expected


def test_a_half_training_is_continued_and_done_runs_are_not_touched(
    live_study: Path, undisturbed: tuple[dict[str, str], float]
) -> None:
    """Ctrl-C while LoRASculpt trains: its jobs end with the runner, and the next one continues from the checkpoint."""
    write_grid(live_study, "mini", ENTRIES)
    adapters = live_study / "runs" / "experiments" / "tiny"
    process = start(live_study, "mini", "--jobs", "1")
    wait_for(lambda: any(adapters.glob("iconqa_sculpt*/checkpoint-*")))
    output = kill(process, signal.SIGINT)
    assert process.returncode == 130 and "interrupted" in output and "Traceback" not in output
    half = next(adapters.glob("iconqa_sculpt*"))
    assert json.loads((half / "run.json").read_text())["status"] == "running"
    files = {file: file.stat().st_mtime_ns for file in (live_study / "results" / "tiny" / "runs").glob("*")}
    step = max(int(folder.name.split("-")[1]) for folder in half.glob("checkpoint-*"))
    output = start(live_study, "mini").communicate(timeout=300)[0]
    assert f"{len(files)} of them done" in output
    assert {file: file.stat().st_mtime_ns for file in files} == files
    log = next((adapters / "logs").glob("iconqa_sculpt*.log")).read_text()
    assert log.count("=====") == 2 and step < 8  # begun twice
    assert results_of(live_study) == undisturbed[0]


def test_a_failed_run_is_named_and_the_others_are_done(live_study: Path) -> None:
    write_grid(live_study, "mini", [{"method": "zero_shot"}, {"method": "lora", "task": "iconqa"}])
    # In the way of the training's folder: another run's.
    output = start(live_study, "mini", "--dry_run").communicate(timeout=60)[0]
    assert "1 trainings" in output and not (live_study / "results").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(live_study)
        run = read_grid("mini", "tiny").runs[1]
        adapter_folder(run).mkdir(parents=True)
        (adapter_folder(run) / "something.txt").write_text("not a run")
    process = start(live_study, "mini")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "FAILED iconqa lora r4 seed 1" in output and "is not empty and holds no run" in output and ".log" in output
    assert len(results_of(live_study)) == 1


def test_what_is_wrong_with_a_training_is_told_before_any_run(live_study: Path) -> None:
    entry = {"method": "lora", "task": "iconqa"}
    write_grid(live_study, "mini", [{**entry, "connector": "sculpt"}, {**entry, "lora_dropout": 2}])
    process = start(live_study, "mini")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "Traceback" not in output
    assert "connector: sculpt needs method: sculpt" in output and "lora_dropout: must be in [0, 1)" in output
    assert not (live_study / "results").exists()


@pytest.mark.slow
def test_results_of_other_data_are_done_again(live_study: Path) -> None:
    write_grid(live_study, "mini", [{"method": "zero_shot"}])
    assert "1 jobs done" in start(live_study, "mini").communicate(timeout=120)[0]
    file = next((live_study / "results" / "tiny" / "runs").glob("*"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base": "0" * 64}))
    output = start(live_study, "mini").communicate(timeout=120)[0]
    assert "1 results are of another base model or other data: done again" in output
    assert json.loads(file.read_text())["base"] == content["base"]
