"""The whole evaluation on prepared folders: results, predictions, table, figure, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.figure import plot_source_target
from llava_sculpt.evaluation.run import choose_target, evaluate, load_tasks, summarise, tasks_of
from llava_sculpt.evaluation.table import format_details, format_table

IDS = {name: [f"{name}{i}" for i in range(3)] for name in ("ocrvqa", "iconqa", "gqa")}
IDS |= {"okvqa": [1, 2, 3], "textvqa": [4, 5, 6], "coco": [7, 8, 9]}


@pytest.fixture
def data_root(prepare_task, tmp_path) -> Path:
    def plain(name):
        return [{"question_id": q, "answer": "x"} for q in IDS[name]]

    answers = [{"answer_id": i, "answer": "dog"} for i in range(10)]
    gold = {
        "iconqa": plain("iconqa"),
        "ocrvqa": plain("ocrvqa"),
        "okvqa": {"annotations": [{"question_id": q, "answers": answers} for q in IDS["okvqa"]]},
        "textvqa": {"data": [{"question_id": q, "answers": ["dog"] * 10} for q in IDS["textvqa"]]},
        "gqa": {q: {"answer": "yes", "isBalanced": True, "types": {"structural": "verify"}} for q in IDS["gqa"]},
        "coco": {
            "images": [{"id": q} for q in IDS["coco"]],
            "annotations": [{"image_id": q, "caption": f"a dog {q}"} for q in IDS["coco"]],
        },
    }
    for name, content in gold.items():
        prepare_task(name, content, IDS[name])
    return tmp_path / "data"


def run(world, data_root, tmp_path, tasks, **options):
    options = {"max_new_tokens": 4, "label": "random", "batch_size": 2, **options}
    return evaluate(world, load_tasks(tasks, data_root, "test"), tmp_path / "out", **options)


def test_results_say_what_each_number_is(world, data_root, tmp_path):
    results = run(world, data_root, tmp_path, list(IDS), target="iconqa")
    assert set(results["tasks"]) == set(IDS)
    for entry in results["tasks"].values():
        assert entry["n"] == 3
        assert {"score", "metric", "split", "prompt_style", "decoding", "variant"} <= entry.keys()
    assert "binary" in results["tasks"]["gqa"]
    assert results["avg"] == (results["source"] + results["target"]) / 2
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert results["base"] == world.checkpoint.fingerprint()
    again = run(world, data_root, tmp_path, list(IDS), target="iconqa")
    assert again == results
    other = run(world, data_root, tmp_path, list(IDS), target="iconqa", okvqa_variant="official")
    assert other["config_hash"] != results["config_hash"]


@pytest.mark.parametrize("option", [{"max_new_tokens": 0}, {"target": "coco"}])
def test_bad_settings_are_refused_before_anything_is_written(world, data_root, tmp_path, option):
    with pytest.raises(UserError):
        run(world, data_root, tmp_path, ["gqa"], **option)
    assert not (tmp_path / "out").exists()


def test_predictions_are_in_llava_answers_format(world, data_root, tmp_path):
    run(world, data_root, tmp_path, ["gqa"])
    lines = (tmp_path / "out/predictions/gqa.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["question_id"] for r in records] == IDS["gqa"]
    assert set(records[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert records[1]["prompt"] == "what is 1 ?"
    assert records[1]["text"] == records[1]["text"].strip()
    assert len({r["answer_id"] for r in records}) == 3


def test_source_target_and_avg_need_all_their_parts():
    scores = {"okvqa": 1.0, "ocrvqa": 2.0, "gqa": 3.0, "textvqa": 6.0, "coco": 9.0}
    assert summarise(scores, "coco") == {"source": 3.0, "target": 9.0, "target_task": "coco", "avg": 6.0}
    assert summarise(scores, None) == {"source": 3.0, "target": None, "target_task": None, "avg": None}
    del scores["gqa"]
    assert summarise(scores, "coco")["source"] is None
    assert summarise(scores, "coco")["avg"] is None


def test_the_target_is_the_only_one_evaluated_or_the_one_named():
    assert choose_target(["okvqa", "coco"], None) == "coco"
    assert choose_target(["iconqa", "coco"], None) is None
    assert choose_target(["iconqa", "coco"], "iconqa") == "iconqa"
    for names, target in ((["iconqa"], "coco"), (["gqa"], "gqa")):
        with pytest.raises(UserError):
            choose_target(names, target)


def test_all_bad_tasks_are_told_at_once(data_root, tmp_path):
    (data_root / "okvqa/manifest.json").unlink()
    (data_root / "gqa/test.jsonl").write_text('{"question_id": 1}\n{\n')
    (data_root / "textvqa/test.jsonl").write_text('{"question_id": 1, "text": "a", "image": "gone.png"}\n')
    with pytest.raises(UserError) as caught:
        load_tasks(["okvqa", "gqa", "textvqa", "iconqa"], data_root, "test")
    told = str(caught.value)
    for part in ("okvqa is not prepared", "line 2", "gone.png"):
        assert part in told
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError, match=r"no split 'val'.*test"):
        load_tasks(["iconqa"], data_root, "val")


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("gqa,icon_qa", "icon_qa is not a task; did you mean iconqa?"),
        ("runs/tiny/iconqa", "looks like a model, which --model takes"),
        ("chess", "known: all, iconqa, coco"),
        (",", "--tasks: empty"),
    ],
)
def test_wrong_names_of_tasks(tasks, words):
    with pytest.raises(UserError, match=words):
        tasks_of(tasks)


def test_question_lines_may_hold_unicode_line_separators(data_root):
    record = {"question_id": "iconqa0", "text": "a\u2028b", "image": "0.png"}
    (data_root / "iconqa/test.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_tasks(["iconqa"], data_root, "test")[0].questions == [record]


def test_table_and_details():
    tasks = {
        "gqa": {
            "score": 61.928,
            "binary": 80.0,
            "open": 45.5,
            "n": 12578,
            "metric": "accuracy",
            "variant": "exact match, balanced",
            "split": "test",
            "prompt_style": "short answer",
            "decoding": "greedy",
        }
    }
    results = {"tasks": tasks, "source": None, "target": 110.271, "avg": None}
    table = format_table([("zero-shot", results), ("LoRA", results)])
    header, rule, first, _ = table.splitlines()
    assert header.split() == ["OKVQA", "OCRVQA", "GQA", "TextVQA", "Source", "Target", "Avg"]
    assert set(rule) == {"-"}
    assert first.split() == ["zero-shot", "-", "-", "61.93", "-", "-", "110.27", "-"]
    assert first.index("61.93") + 5 == header.index("GQA") + 3
    details = format_details(results)
    for part in ("gqa: accuracy 61.93", "binary 80.00", "open 45.50", "N 12578", "test", "short answer", "greedy"):
        assert part in details


@pytest.mark.parametrize(
    "rows",
    [
        [("one", 61.0, 23.0)],
        [("zero-shot", 61.09, 40.4), ("LoRA", 50.0, 110.3), ("LoRA", 50.1, 110.2), ("LoRASculpt", 58.0, 112.0)],
        [(f"run {i}", 80.0, 90.0) for i in range(12)],
        [("a", 0.0, 0.0), ("b", 100.0, 100.0)],
    ],
)
def test_figure_is_a_png(tmp_path, rows):
    path = tmp_path / "new" / "figure.png"
    plot_source_target(rows, path, target_name="IconQA", title="tiny")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 600
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]
