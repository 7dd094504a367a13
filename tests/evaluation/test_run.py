"""The whole evaluation on prepared folders: results, predictions, table, figure, and bad input."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.figure import plot_forgetting, plot_source_target
from llava_sculpt.evaluation.journal import Journal
from llava_sculpt.evaluation.prepared import load_tasks, tasks_of
from llava_sculpt.evaluation.run import choose_target, evaluate, summarise
from llava_sculpt.evaluation.table import format_details, format_table
from llava_sculpt.locks import folder_lock

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


def test_the_folder_of_another_model_is_refused_and_of_the_same_one_replaced(world, data_root, tmp_path):
    file = tmp_path / "out" / "results.json"
    results = run(world, data_root, tmp_path, ["gqa"])
    assert run(world, data_root, tmp_path, ["gqa"], max_new_tokens=3)["config_hash"] != results["config_hash"]
    other = {**results, "inputs": {**results["inputs"], "model": "0" * 64}}
    old = {key: value for key, value in results.items() if key not in ("inputs", "precision")}
    for content in (other, {**old, "model_id": "lora"}, {**old, "tasks": []}, {}):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match="--output_dir"):
            run(world, data_root, tmp_path, ["gqa"])
        assert json.loads(file.read_text()) == content
    file.write_text(json.dumps(old))
    assert run(world, data_root, tmp_path, ["gqa"]) == results


def test_the_precision_is_recorded_and_what_is_not_exact_is_not_mixed_with_what_is(world, data_root, tmp_path, capsys):
    half = replace(world, model=copy.deepcopy(world.model).bfloat16())

    def killed(loaded, exact):
        """What is told about a journal that an evaluation leaves."""
        with pytest.raises(KeyboardInterrupt), patch.object(Journal, "remove", side_effect=KeyboardInterrupt):
            run(loaded, data_root, tmp_path, ["gqa"], exact=exact)
        return "not continued" in capsys.readouterr().err, json.loads((tmp_path / "out/results.json").read_text())

    refused, results = killed(half, False)
    assert not refused and results["precision"] == {"dtype": "bfloat16", "exact": False, "merged": False}
    assert not killed(half, False)[0] and killed(half, True)[0]
    shutil.rmtree(tmp_path / "out")
    refused, results = killed(world, False)
    assert not refused and results["precision"] == {"dtype": "float32", "exact": True, "merged": False}
    assert not killed(world, True)[0]  # in float32 it is the same


def test_one_evaluation_at_a_time_works_in_a_folder(world, data_root, tmp_path):
    with folder_lock(tmp_path / "out"), pytest.raises(UserError, match="another process is at work there"):
        run(world, data_root, tmp_path, ["gqa"])
    assert run(world, data_root, tmp_path, ["gqa"])["tasks"]["gqa"]["n"] == 3


def test_answers_to_other_images_or_by_other_processing_are_not_taken(world, data_root, pictures, tmp_path, capsys):
    def answered(folder, processor):
        """Whether the answers of a killed evaluation are taken; the images are those in `folder`."""
        (task,) = load_tasks(["gqa"], data_root, "test")
        task = replace(task, image_folder=folder)
        loaded = replace(world, checkpoint=replace(world.checkpoint, path=processor))
        with pytest.raises(KeyboardInterrupt), patch.object(Journal, "remove", side_effect=KeyboardInterrupt):
            evaluate(loaded, [task], tmp_path / "out", label="random", max_new_tokens=4)
        return "not continued" not in capsys.readouterr().err

    images = shutil.copytree(pictures, tmp_path / "copies")
    processor = shutil.copytree(world.checkpoint.path, tmp_path / "checkpoint")
    assert answered(images, processor) and answered(pictures, processor)
    before = (images / "1.png").stat()
    Image.new("RGB", (11, 12), (1, 2, 3)).save(images / "1.png")
    os.utime(images / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not answered(images, processor)
    file = processor / "preprocessor_config.json"
    file.write_text(file.read_text() + "\n")
    assert not answered(images, processor)


def test_prepared_files_that_were_changed_or_do_not_go_together(data_root):
    folder = data_root / "gqa"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {"test.jsonl": "0" * 64}}))
    with pytest.raises(UserError, match="not as it was prepared"):
        load_tasks(["gqa"], data_root, "test")
    (folder / "manifest.json").write_text(json.dumps({**manifest, "name": "okvqa"}))
    with pytest.raises(UserError, match="holds 'okvqa', not gqa"):
        load_tasks(["gqa"], data_root, "test")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "test.jsonl").write_text((folder / "test.jsonl").read_text().splitlines()[0])
    with pytest.raises(UserError, match=r"does not go with test\.jsonl: .*2 questions without"):
        load_tasks(["gqa"], data_root, "test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": 5}, "field 'text' should be str"),
        ({"question_id": [1]}, "needs a number or a text under 'question_id'"),
        ({"image": 7}, "field 'image' should be str"),
        ({"image": "../1.png"}, "is not inside the image folder"),
        ({"text": "an <image> ?"}, "reserved text '<image>'"),
    ],
)
def test_wrong_questions(data_root, change, words):
    file = data_root / "gqa/test.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]))
    with pytest.raises(UserError, match=re.escape(words)):
        load_tasks(["gqa"], data_root, "test")


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
        tasks_of(tasks, [])


def test_question_lines_may_hold_unicode_line_separators(data_root):
    record = {"question_id": "iconqa0", "text": "a\u2028b", "image": "0.png"}
    (data_root / "iconqa/test_annotations.json").write_text('[{"question_id": "iconqa0", "answer": "x"}]')
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
    plot_forgetting({"step": [4], "forgetting_kl": [0.0], "forgetting_changed": [0.0]}, path.parent / "forgetting.png")
    with Image.open(path.parent / "forgetting.png") as image:
        assert image.format == "PNG" and image.width > 600
    assert sorted(p.name for p in path.parent.iterdir()) == ["figure.png", "forgetting.png"]
