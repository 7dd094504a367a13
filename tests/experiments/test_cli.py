"""`llava-sculpt` as a user types it: bad input ends with one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_sculpt.cli import main
from tests.train.conftest import flags, train  # noqa: F401


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--model", "nowhere", "--tasks", "chess"], "unknown chess"),
        (["eval", "--model", "nowhere", "--tasks", "gqa", "--data_root", "nowhere"], "gqa is not prepared"),
        (["inspect", "nowhere"], "nowhere"),
        (["prepare", "gqa", "--raw", "nowhere", "--out", "x"], "nowhere: folder not found"),
        (["experiment", "tabel1", "--scale", "tiny"], "did you mean table1?"),
        (["experiment", "nowhere.yaml", "--scale", "tiny"], "nowhere.yaml"),
        (["finetune", "iconqa", "--scale", "paper"], "--scale paper cannot run here"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_flag_that_no_command_knows() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llava_sculpt.cli", "inspect", "x", "--colour"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "--colour" in done.stderr and "Traceback" not in done.stderr


def test_inspect_tells_densities(train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert train(tmp_path / "run", max_steps=7) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for module in found["modules"]:
        rank, (rows, columns) = module["rank"], module["shape"]
        assert module["density_A"] == (rank * columns // 10) / (rank * columns)
        assert module["density_B"] == (rank * rows // 10) / (rank * rows)
        assert 0 < module["density_BA"] <= 1
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"total ({len(found['modules'])} modules)" in capsys.readouterr().out
