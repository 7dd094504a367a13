"""A generated model card: fit for the Hub, and what it prints runs. One short run of the real command for all tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from llava_sculpt.artifacts.model_card import write_model_card
from llava_sculpt.cli import main
from llava_sculpt.names import TASKS
from tests.evaluation.conftest import first_questions
from tests.experiments.conftest import REPOSITORY, make_study

RUN = "runs/tiny/iconqa/lora_r4_seed42"
CONFIG = ["--config", "configs/tiny/iconqa_lora.yaml", "--output_dir", RUN]


def shell(script: str, folder: Path, program: list[str]) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*program, script], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, checkpoint: Path) -> Path:
    """A repository folder with one trained run, as `llava-sculpt train` left it."""
    folder = make_study(tmp_path_factory.mktemp("card") / "study")
    data = first_questions(tiny_data, folder / "data" / "tiny", dict.fromkeys(TASKS, 2))
    (data / "iconqa" / "train.json").write_bytes((tiny_data / "iconqa" / "train.json").read_bytes())
    (data / "world.json").write_bytes((tiny_data / "world.json").read_bytes())
    (data / "raw").symlink_to(tiny_data / "raw")
    (folder / "data" / "tiny_llava").symlink_to(checkpoint)
    done = shell(f"llava-sculpt train {' '.join(CONFIG)}", folder, ["bash", "-c"])
    assert done.returncode == 0, done.stderr
    return folder


def card_of(study: Path) -> str:
    return (study / RUN / "README.md").read_text(encoding="utf-8")


def test_the_card_can_be_uploaded_as_it_is(study: Path) -> None:
    card = ModelCard(card_of(study))
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["license"] and data["tags"]
    assert "base_model" not in data and None not in data.values()
    assert str(study) not in card.content and str(Path.home()) not in card.content
    assert not re.search(r"[\s\"'=`(]/\w", card.text), "an absolute path"
    assert "Not evaluated yet" in card.text


def test_a_base_on_the_hub_is_named_and_its_licence_told(study: Path, tmp_path: Path) -> None:
    for file in (study / RUN).glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    run = json.loads((tmp_path / "run.json").read_text())
    run["base"]["path"], run["world_size"] = "llava-hf/llava-1.5-7b-hf", 4
    run["command"] += " --local_rank=0 --data_path=/home/me/data/train.json"
    (tmp_path / "run.json").write_text(json.dumps(run))
    write_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "llava-hf/llava-1.5-7b-hf" and card.data.license == "llama2"
    validate_repo_id(card.data.base_model)
    assert "torchrun --nproc_per_node 4 -m llava_sculpt.train.train --config configs/tiny" in card.text
    assert "/home" not in card.content and "--local_rank" not in card.content


def test_the_snippet_loads_adapter_and_connector(study: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", card_of(study), re.DOTALL)
    check = """
from llava_sculpt.artifacts.inference import load_for_inference
ours = load_for_inference(folder, dtype=torch.bfloat16).model.state_dict()
assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
assert any("lora_B" in name for name in ours)
"""
    done = shell(snippet + check, study, [sys.executable, "-c"])
    assert done.returncode == 0, done.stderr


def test_the_commands_run_as_printed_and_evaluation_puts_its_scores_into_the_card(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (commands,) = re.findall(r"```bash\n(.*?)```", card_of(study), re.DOTALL)
    done = shell(commands, study, ["bash", "-ec"])
    assert done.returncode == 0, done.stderr
    assert "already finished" in done.stdout and "data: data/tiny" in done.stdout
    assert (study / f"{RUN}-merged" / "merge.json").is_file()
    card = ModelCard(card_of(study))
    scores = {result.dataset_type for result in card.data.eval_results}
    assert {"iconqa", "coco", "gqa", "okvqa", "ocrvqa", "textvqa", "source"} <= scores
    assert "OCRVQA" in card.text and "Not evaluated yet" not in card.text

    # From another folder: the base is found from the run, the data beside the base; so for what was merged.
    monkeypatch.chdir(tmp_path)
    for model in (RUN, f"{RUN}-merged"):
        assert main(["eval", "--model", str(study / model), "--tasks", "gqa", "--max_new_tokens", "2"]) == 0
        assert f"data: {study / 'data' / 'tiny'}" in capsys.readouterr().out
    assert (tmp_path / "runs" / "eval" / Path(RUN).name / "results.json").is_file()
    assert ModelCard(card_of(study)).content == card.content  # one task does not make a card
