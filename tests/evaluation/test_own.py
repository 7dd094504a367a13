"""A task of one's own: its data checked, split, prepared and scored, as a benchmark is from the same data."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sculpt.cli import main
from llava_sculpt.data.conversation import IGNORE_INDEX, encode_prompt, encode_record
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.own import prepare_own
from llava_sculpt.evaluation.prepared import load_tasks, tasks_of
from llava_sculpt.evaluation.run import choose_target, evaluate
from llava_sculpt.evaluation.scorers import scorer_of
from llava_sculpt.evaluation.scorers.general import chosen_letter
from llava_sculpt.experiments import finetune
from llava_sculpt.experiments.grid import read_grid
from llava_sculpt.train.train import main as train_main
from tests.evaluation.conftest import first_questions


def record(image: str | None, *turns: str, name: Any = None) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    found: dict[str, Any] = {"conversations": said}
    if image is not None:
        said[0]["value"] = "<image>\n" + said[0]["value"]
        found["image"] = image
    return found if name is None else {"id": name, **found}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """20 pictures, each twice under different names, asked two questions each: mine/all.json and mine/*.png."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        shutil.copy(folder / f"{i}.png", folder / f"again{i}.png")
        for name in (f"{i}.png", f"again{i}.png"):
            records += [record(name, f"what is {q} ?", f"a {i}{q}", name=f"{name}/{q}") for q in (1, 2)]
    write(folder / "all.json", records)
    return folder


def write(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


def lines(file: Path, *records: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def test_no_picture_is_on_both_sides(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "mine"
    manifest = prepare_own(out, mine / "all.json", holdout=0.2)
    assert manifest["splits"] == {"test": {"n": 16}, "train": {"n": 64}} and manifest["metric"] == "exact"
    train = json.loads((out / "train.json").read_text())
    (task,) = load_tasks(["mine"], tmp_path / "data", "test")

    def numbers(names: list[str]) -> set[str]:
        return {name.removeprefix("again") for name in names}

    held = numbers([q["image"] for q in task.questions])
    assert len(held) == 4 and not held & numbers([r["image"] for r in train])
    everything = json.loads((mine / "all.json").read_text())
    assert train == [r for r in everything if r["image"].removeprefix("again") not in held]
    asked = {q["question_id"]: (q["text"], task.gold[q["question_id"]]) for q in task.questions}
    gone = [r for r in everything if r not in train]
    assert asked == {
        r["id"]: (r["conversations"][0]["value"].removeprefix("<image>\n"), r["conversations"][1]["value"])
        for r in gone
    }
    before = (out / "test.jsonl").read_bytes()
    assert prepare_own(out, mine / "all.json", holdout=0.2) == manifest
    with pytest.raises(UserError, match=r"prepared differently.*options.*--name.*--overwrite"):
        prepare_own(out, mine / "all.json", holdout=0.3)
    assert (out / "test.jsonl").read_bytes() == before
    assert prepare_own(out, mine / "all.json", holdout=0.3, overwrite=True)["splits"]["test"]["n"] == 24


def test_the_last_answer_of_a_conversation_is_gold(mine: Path, tmp_path: Path, world: Any) -> None:
    talk = record("1.png", "what is it ?", "a dog", "what colour ?", "red", "how many ?", "two", name=7)
    test = write(mine / "test.json", [talk, record(None, "who ?", "me", name=7), record("2.png", "what ?", "cat")])
    prepare_own(tmp_path / "data" / "talk", None, test=test)
    (task,) = load_tasks(["talk"], tmp_path / "data", "test")
    assert task.gold == {7: "two", "7#2": "me", 3: "cat"}
    assert "image" not in task.questions[1]
    asked = task.questions[0]
    assert asked["rounds"] == [["what is it ?", "a dog"], ["what colour ?", "red"]] and asked["text"] == "how many ?"
    ids, labels = encode_record(talk, world.tokenizer)
    prompt = encode_prompt(asked["text"], world.tokenizer, True, asked["rounds"])
    last = max(i for i, label in enumerate(labels) if label == IGNORE_INDEX)
    assert prompt == ids[: last + 1]
    results = evaluate(world, [task], tmp_path / "out", label="random", max_new_tokens=3)
    assert results["tasks"]["talk"]["n"] == 3 and results["target_task"] == "talk"


def test_a_question_file_with_its_answers(mine: Path, tmp_path: Path) -> None:
    asked = [{"question_id": i, "image": f"{i}.png", "text": "what ?"} for i in range(3)]
    test = lines(mine / "test.jsonl", *asked)
    gold = [{"question_id": i, "answer": ["cat", "a cat", f"cat {i}"]} for i in range(3)]
    answers = lines(mine / "gold.jsonl", *gold)
    prepare_own(tmp_path / "data" / "q", None, test=test, answers=answers, metric="vqa")
    (task,) = load_tasks(["q"], tmp_path / "data", "test")
    assert task.gold == {i: ["cat", "a cat", f"cat {i}"] for i in range(3)}
    within = lines(mine / "within.jsonl", *({**q, "answer": "cat"} for q in asked))
    prepare_own(tmp_path / "data" / "w", None, test=within)
    assert load_tasks(["w"], tmp_path / "data", "test")[0].gold == dict.fromkeys(range(3), "cat")


def test_answers_to_one_question_come_together(mine: Path, tmp_path: Path) -> None:
    captions = [record(f"{i}.png", "describe it .", f"a dog on a hill {n}") for i in range(2) for n in range(3)]
    test = write(mine / "test.json", captions)
    prepare_own(tmp_path / "data" / "captions", None, test=test, metric="cider")
    (task,) = load_tasks(["captions"], tmp_path / "data", "test")
    assert task.gold == {1: [f"a dog on a hill {n}" for n in range(3)], 4: [f"a dog on a hill {n}" for n in range(3)]}
    assert task.scorer.score(task.gold, [(1, "a cat"), (4, "a dog on a hill 1")], "authors", "python").per_item[1] < 5


TWO = [record("0.png", "what ?", "cat"), record("1.png", "what ?", "dog")]


@pytest.mark.parametrize(
    ("train", "test", "options", "words"),
    [
        (TWO, None, {"images": "gone"}, "no such folder"),
        ([record("gone.png", "a", "b")] * 2, None, {}, r"record 1: image not found.*gone.png"),
        ([*TWO, {"image": "0.png"}], None, {}, r"train.json: record 3: has no 'conversations'"),
        ([record("0.png", "what ?", "cat")], None, {}, "0 test questions, at least 2"),
        (TWO, None, {}, "1 test questions, at least 2"),
        (TWO, TWO[:1], {}, "1 of its pictures are in|1 test questions"),
        (TWO, [record("again1.png", "what ?", "dog"), record("2.png", "what ?", "dog")], {}, r"again1.png \(= 1.png\)"),
        (None, [*TWO, {"image": "0.png", "text": "x"}], {}, "needs a number or a text under|no field"),
        (None, [{"question_id": 1, "text": "x"}, {"question_id": 2, "text": "y"}], {}, "no field 'answer'"),
        (None, TWO, {"metric": "choice"}, r"'cat' is not the letter of a choice.*--metric choice"),
        (None, TWO, {"metric": "cider"}, "cider compares texts"),
        (None, TWO, {"metric": "bleu"}, "not one of exact"),
        (None, [record("0.png", "what ?", "a long text of quite many words")] * 2, {}, "say how to score them"),
        (None, [record("0.png", "what ?", "?!"), *TWO], {"metric": "contains"}, "holds no word"),
        (None, [record("0.png", "a", "b", "<image> c", "d"), *TWO], {}, "<image>"),
        (TWO, [record("3.png", "what ?", "x")] * 2, {"holdout": 0.5}, "give one of them"),
        (TWO, None, {"holdout": 1.5}, "between 0 and 1"),
        (TWO, None, {"answers": "train.json"}, "which --test names"),
    ],
)
def test_bad_data(mine: Path, tmp_path: Path, train: Any, test: Any, options: dict[str, Any], words: str) -> None:
    files = {
        name: write(mine / f"{name}.json", content)
        for name, content in (("train", train), ("test", test))
        if content is not None
    }
    given = {key: mine / value if key in ("images", "answers") else value for key, value in options.items()}
    if "test" in files:
        given["test"] = files["test"]
    with pytest.raises(UserError, match=f"(?s){words}"):
        prepare_own(tmp_path / "data" / "bad", files.get("train"), **given)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["iconqa", "a b", ".x", "x" * 65])
def test_names_that_no_task_can_have(mine: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name"):
        prepare_own(tmp_path / name, mine / "all.json")


@pytest.mark.parametrize(
    ("metric", "gold", "right", "wrong"),
    [
        ("exact", "Cat", ["cat", "CAT"], ["a cat", "cat."]),
        ("contains", "red cat", ["A Red, cat.", "the red cat sat"], ["cat red", "red cats", "credit cat", ""]),
        (
            "choice",
            "B",
            ["B", "b", "(B)", "B.", "B. dog", "B) dog", "The answer is B.", "Answer: (B)"],
            ["A", "Bob", "dog"],
        ),
        ("choice", "B. the dog", ["B"], ["the dog", "The answer is a dog"]),
        ("vqa", ["two", "2 dogs"], ["2", "Two.", "two dogs"], ["three", "dogs"]),
    ],
)
def test_metrics(metric: str, gold: Any, right: list[str], wrong: list[str]) -> None:
    scorer = scorer_of("mine", metric)
    for text in right + wrong:
        assert scorer.score({1: gold}, [(1, text)], "authors", None).score == (100.0 if text in right else 0.0), text


def test_vqa_accuracy_of_many_answers() -> None:
    answers = ["two"] * 2 + ["three"] * 8
    assert scorer_of("mine", "vqa").score({1: answers}, [(1, "2")], "authors", None).score == pytest.approx(60)
    assert scorer_of("mine", "vqa").score({1: answers}, [(1, "3")], "authors", None).score == 100


def test_a_letter_is_none_of_a_sentence() -> None:
    assert chosen_letter("A cat") is None and chosen_letter("I think so") is None and chosen_letter("") is None


def test_the_same_data_has_the_same_score_as_a_benchmark(tiny_data: Path, tmp_path: Path, world: Any) -> None:
    root = first_questions(tiny_data, tmp_path / "data", {"iconqa": 12})
    images = tiny_data / "raw" / "iconqa" / "iconqa_data"
    prepare_own(
        root / "copy",
        tiny_data / "iconqa" / "train.json",
        images,
        test=root / "iconqa" / "test.jsonl",
        answers=root / "iconqa" / "test_annotations.json",
    )
    assert json.loads((root / "copy/train.json").read_text()) == json.loads(
        (tiny_data / "iconqa/train.json").read_text()
    )
    results = [
        evaluate(world, load_tasks([name], root, "test"), tmp_path / name, label="random", max_new_tokens=4)
        for name in ("iconqa", "copy")
    ]
    one, other = (r["tasks"][n] for r, n in zip(results, ("iconqa", "copy"), strict=True))
    assert (one["score"], one["metric"], one["n"]) == (other["score"], other["metric"], other["n"])
    answers = [(tmp_path / n / "predictions" / f"{n}.jsonl").read_text().splitlines() for n in ("iconqa", "copy")]
    assert [json.loads(line)["text"] for line in answers[0]] == [json.loads(line)["text"] for line in answers[1]]


def test_eval_scores_ones_own_questions(
    checkpoint: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    test = write(mine / "test.json", TWO)
    words = ["eval", "--model", str(checkpoint), "--data", str(test), "--metric", "contains", "--name", "pets"]
    assert main([*words, "--max_new_tokens", "2", "--output_dir", "out"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["tasks"]) == ["pets"] and results["target"] == results["tasks"]["pets"]["score"]
    assert tasks_of("pets,gqa", [tmp_path / "data"]) == ["pets", "gqa"]
    assert choose_target(["pets", "gqa"], None) == "pets"
    assert main(["compare", "out", "out"]) == 2  # one folder twice
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    assert main(["compare", "out", "other"]) == 0
    assert "pets" in (tmp_path / "runs/compare.html").read_text()
    capsys.readouterr()
    assert main(["eval", "--model", str(checkpoint), "--metric", "vqa", "--tasks", "gqa"]) == 2
    assert "--metric: belongs to --data" in capsys.readouterr().err
    assert main(["prepare", "own", "--data", str(mine / "all.json"), "--out", "data/twenty"]) == 0
    assert "train 72, test 8; exact" in capsys.readouterr().out.replace("test 8, train 72", "train 72, test 8")


def test_a_grid_takes_ones_own_task(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    grid = tmp_path / "mine.yaml"
    grid.write_text("title: mine\ntiny:\n  - {method: [lora, sculpt, orth], task: charts}\n")
    with pytest.raises(UserError, match="nor a task of your own that is prepared in data/tiny"):
        read_grid(str(grid), "tiny")
    prepare_own(Path("data/tiny/charts"), mine / "all.json")
    runs = read_grid(str(grid), "tiny").runs
    assert [run.name.rsplit("_", 1)[0] for run in runs] == [f"charts_{m}_r32_seed1" for m in ("lora", "sculpt", "orth")]
    assert runs[0].tasks[0] == "charts" and runs[2].setting("reg_lambda") is not None


def test_finetune_with_some_source_sets(
    checkpoint: Path,
    mine: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the data to table, figures, page and card at the paper's scale, but for the GPU: training runs in here."""
    shutil.copytree("configs", tmp_path / "configs")
    for recipe in (tmp_path / "configs").glob("iconqa_*.yaml"):
        kept = [x for x in recipe.open() if not x.startswith(("deepspeed:", "bf16:", "tf32:", "dataloader"))]
        recipe.write_text("".join(kept))
    first_questions(tiny_data, tmp_path / "data", {"gqa": 3, "okvqa": 2})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "missing_for_paper", lambda *_: [])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)

    run = subprocess.run

    def launched(words: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        if words[:3] != ["deepspeed", "--num_gpus", "1"]:
            return run(words, **options)
        return subprocess.CompletedProcess(words, train_main(words[4:]))

    monkeypatch.setattr(subprocess, "run", launched)
    words = ["finetune", "--scale", "paper", "--data", str(mine / "all.json"), "--name", "mine", "--rank", "4"]
    words += ["--model_name_or_path", str(checkpoint), "--max_steps", "3", "--sculpt_warmup_steps", "1"]
    assert main([*words, "--forgetting_probe", "3"]) == 0
    told = capsys.readouterr()
    folder = tmp_path / "runs/paper/mine/sculpt_r4_seed42"
    assert "not prepared, so what is forgotten of them is not measured: ocrvqa, textvqa" in told.out
    assert "of answers changed" in told.out
    results = json.loads((folder / "results.json").read_text())
    assert set(results["tasks"]) == {"mine", "gqa", "okvqa"} and results["source"] is None
    assert results["target"] == results["tasks"]["mine"]["score"]
    for name in ("source_target.png", "forgetting.png", "forgetting.html", "README.md"):
        assert (folder / name).stat().st_size > 1000, name
    assert json.loads((folder / "run.json").read_text())["base"]["path"] == str(checkpoint)
    assert main(["finetune", "mine", *words[1:3], *words[7:], "--method", "lora"]) == 0  # by its name, once prepared
    assert "LoRASculpt r=4 seed 42" in capsys.readouterr().out
