"""`make gpu-report`, dry: every part of it on the CPU, by the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_report.py"


def report(folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and output of the command with its report and its work in `folder`."""
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--folder", str(folder / "work"), *words]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return ended.returncode, ended.stdout


def written(folder: Path) -> tuple[dict[str, Any], str]:
    """The JSON and the table."""
    (file,) = folder.glob("cpu_tiny_*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_without_time_or_a_gpu_it_says_so(tmp_path: Path) -> None:
    code, output = report(tmp_path, "--tiny", "--minutes", "0.01")
    assert code == 0, output
    found, table = written(tmp_path)
    assert {part["reason"] for part in found["parts"].values()} == {"no time left: give the command again"}
    assert table.startswith("A dry run on a CPU") and table.count("not run: no time left") == len(found["parts"])
    (file,) = tmp_path.glob("*.json")
    file.write_text(json.dumps({**found, "parts": {"card": {"status": "well"}}}))
    code, output = report(tmp_path, "--tiny")
    assert code == 2 and f"{file}: parts.card.status" in output
    code, output = report(tmp_path)
    assert code == 2 and "no GPU that PyTorch can use" in output


@pytest.mark.slow
def test_every_part_and_a_second_call_that_does_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    in_the_way = tmp_path / "work" / "fp16"
    in_the_way.write_text("where the loading part wants to make a folder")
    code, output = report(tmp_path, "--tiny")
    found, table = written(tmp_path)
    parts = found["parts"]
    assert code == 1, output
    states = {name: (part["status"], part["reason"]) for name, part in parts.items() if part["status"] != "done"}
    assert list(states) == ["loading"] and states["loading"][0] == "failed", states
    assert "FileExistsError" in states["loading"][1]
    assert "**Failed: loading.**" in table and states["loading"][1] in table
    assert list(parts)[:2] == ["card", "correctness"]
    for name, part in parts.items():
        assert part["cases"] or name == "loading"
        keys = [(case["table"], case["case"]) for case in part["cases"]]
        assert len(keys) == len(set(keys)), name
        assert all(f"| {case} |" in table and f"### {title}" in table for title, case in keys), name
    assert {case["right"] for case in parts["correctness"]["cases"]} == {"yes"}
    assert {case["right"] for case in parts["engines"]["cases"]} == {"yes"}
    for case in parts["step"]["cases"]:
        for spread in (value for value in case.values() if isinstance(value, dict)):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert any(case["case"].startswith("as the recipe: LoRASculpt, release's") for case in parts["step"]["cases"])

    in_the_way.unlink()
    code, output = report(tmp_path, "--tiny")
    assert code == 0, output
    again = written(tmp_path)[0]["parts"]
    assert output.count("done before") == len(parts) - 1
    assert again.pop("loading")["status"] == "done" and parts.pop("loading")
    assert again == parts
