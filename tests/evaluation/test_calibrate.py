"""The comparison with published scores, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.calibrate import PUBLISHED, check_calibration, compare


def test_the_published_scores_themselves_are_within():
    papers = {entry.task: entry.score for entry in PUBLISHED}
    text, within = compare(papers)
    assert len(text.splitlines()) == 9 and within
    assert "all within" in text


@pytest.mark.parametrize(
    ("scores", "verdicts"),
    [
        ({"gqa": 62.43}, [True, True]),
        ({"gqa": 62.5}, [True, False]),
        ({"gqa": 61.4}, [False, False]),
        ({"textvqa": 46.1, "iconqa": 25.0}, [False, False, True]),
        ({}, []),
    ],
)
def test_within_and_outside(scores, verdicts):
    text, within = compare(scores)
    assert within == all(verdicts)
    assert ["OUTSIDE" not in line for line in text.splitlines()[:-1]] == verdicts
    assert ("of" in text.splitlines()[-1].split(":")[1]) == (False in verdicts)


def test_a_model_of_the_hub_with_defaults_left_out_is_accepted():
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"image_size": 336}}
    check_calibration(config, "m", "test", {"textvqa": "short answer, with OCR tokens"})


def test_everything_that_makes_the_comparison_meaningless_is_told():
    config = {"text_config": {"hidden_size": 5120, "num_hidden_layers": 40}, "vision_config": {}}
    with pytest.raises(UserError) as caught:
        check_calibration(config, "llava-13b", "val", {"textvqa": "short answer, without OCR tokens"})
    assert len(caught.value.problems) == 3
    assert "text_config.hidden_size 5120, text_config.num_hidden_layers 40)" in caught.value.problems[0]


def test_the_command_refuses_a_small_model_before_loading_it(prepare_task, checkpoint: Path, tmp_path, capsys):
    prepare_task("gqa", {"q": {"answer": "yes", "isBalanced": True, "types": {"structural": "verify"}}}, ["q"])
    flags = ["--model", str(checkpoint), "--data_root", str(tmp_path / "data"), "--tasks", "gqa"]
    assert main(["eval", *flags, "--output_dir", str(tmp_path / "out"), "--calibrate"]) == 2
    assert "does not have the shape of LLaVA-1.5-7B" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_values_are_those_of_the_paper():
    file = Path(__file__).parents[2] / "llava_sculpt/experiments/paper_results.json"
    row = json.loads(file.read_text())["table_1"]["zero_shot"]
    names = {"okvqa": "OKVQA", "ocrvqa": "OCRVQA", "gqa": "GQA", "textvqa": "TextVQA", "iconqa": "Target"}
    own = {entry.task: entry.score for entry in PUBLISHED if "LoRASculpt" in entry.source}
    assert own == {task: row["IconQA"][column] for task, column in names.items()} | {
        "coco": row["COCO-Caption"]["Target"]
    }
