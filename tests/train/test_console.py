"""What training prints: help, lines that fit, what was made, and how it ended."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from llava_sculpt.cli import main as cli
from llava_sculpt.config import DataArguments, ModelArguments, SculptArguments, TrainingArguments
from llava_sculpt.names import PENALTIES
from llava_sculpt.train.console import log_line
from llava_sculpt.train.train import main
from tests.runs import Train
from tests.train.test_resume import cut_off_after

COMMON = {"loss": 12.3456, "task_loss": 12.3456, "lr_lora": 1.9e-4, "grad_norm": 123.456}
COMMON |= {"train_tokens_per_second": 12345.6}


@pytest.mark.parametrize(
    "own",
    [
        {"cmr_llm": 1.23e-4, "lr_connector": 1.9e-5, "density": 0.4567},
        {"cmr_llm": 1.23e-4, "cmr_connector": 1.23e-4, "density": 0.4567},
        *({f"{name}_penalty": 1.23e-4, "lr_connector": 1.9e-5} for name in PENALTIES),
    ],
)
def test_lines_fit_100_columns(own: dict[str, float]) -> None:
    line = log_line(1875, 18750, COMMON | own)
    assert len(line) <= 100, line
    assert len(line.split("  ")) == 1 + 4 + len(own.keys() - {"lr_connector", "cmr_connector"}) + 1


@pytest.mark.parametrize("command", [["train", "-h"], ["train", "--lora_r", "8", "--help"]])
def test_help_lists_every_flag(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(command) == 0
    shown = capsys.readouterr().out
    for kind in (ModelArguments, DataArguments, SculptArguments, TrainingArguments):
        for field in dataclasses.fields(kind):
            assert f"\n  --{field.name} " in shown, field.name
            assert field.name not in kind.__annotations__ or field.metadata["help"]
    assert "--sculpt_warmup_steps  Optimizer steps before the masks are made" in shown
    assert max(len(line) for line in shown.splitlines()) <= 110
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("llava-sculpt ")


@pytest.mark.parametrize("words", [["mine.yaml"], ["-c", "mine.yaml"], ["--lora_r=8", "mine.yaml"]])
def test_a_file_without_its_flag_gets_a_hint(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and "did you mean --config mine.yaml?" in errors[0]


def test_a_run_says_what_it_makes_and_what_comes_next(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    options = {"max_steps": 6, "sculpt_warmup_steps": 2, "save_total_limit": 2, "disable_tqdm": False}
    assert train(tmp_path / "run", save_steps=4, **options) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert "step 2: made the masks of 28 matrices, density 0.1 each, kept from here on" in lines
    assert [line.split()[0] for line in lines if "tok/s" in line] == [f"{step}/6" for step in range(1, 7)]
    assert "\r" not in printed.out + printed.err and "Warning" not in printed.err
    last = {line.split()[0]: line for line in lines[lines.index("") :] if line}
    assert list(last)[:4] == ["trained", "in", "took", "next"]
    assert "LoRASculpt, rank 8, on " in last["trained"] and "(24 samples): 6 steps, loss " in last["trained"]
    assert f"llava-sculpt eval --model {tmp_path / 'run'} --tasks all" in last["next"]
    assert cli(lines[-1].split()[1:]) == 0  # the other command, as printed
    capfd.readouterr()

    folder = cut_off_after(4, tmp_path / "run", tmp_path / "cut")
    assert train(folder, save_steps=4, **options) == 0
    assert f"step 4: resumed from {folder / 'checkpoint-4'} with its masks" in capfd.readouterr().out.splitlines()
