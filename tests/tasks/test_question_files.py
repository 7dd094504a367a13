"""Question files of LLaVA's evaluation bundle and of the paper's authors, taken as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_sculpt.evaluation.score_files import score_files
from llava_sculpt.tasks import prepare_benchmark

END = "\nAnswer the question using a single word or phrase."


def put_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(out: Path) -> tuple[list[dict[str, Any]], Any]:
    lines = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    return lines, json.loads((out / "test_annotations.json").read_text())


def test_llavas_gqa_file_chooses_the_questions_and_their_prompts(make_raw, tmp_path):
    asked = [{"question_id": f"q{i}", "image": f"n{i}.jpg", "text": f"Is it {i}? (briefly)"} for i in (2, 0)]
    file = put_lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", asked)
    manifest = prepare_benchmark("gqa", make_raw("gqa"), tmp_path / "out", questions=file)
    lines, gold = prepared(tmp_path / "out")
    assert [(q["question_id"], q["image"], q["text"]) for q in lines] == [
        ("q2", "images/n2.jpg", "Is it 2? (briefly)"),
        ("q0", "images/n0.jpg", "Is it 0? (briefly)"),
    ]
    assert list(gold) == ["q2", "q0"]
    assert manifest["prompt_style"] == f"short answer, test as in {file.name}" and file.name in manifest["source_files"]


def test_llavas_textvqa_file_has_image_ids_for_question_ids(make_raw, tmp_path):
    text = "what {}?\nReference OCR token: " + END
    asked = [{"question_id": f"val{i}", "image": f"val{i}.jpg", "text": text.format(i)} for i in (3, 1)]
    file = put_lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", asked)
    raw = make_raw("textvqa")
    (raw / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()  # not needed: the prompts are in the file
    (raw / "TextVQA_0.5.1_train.json").unlink()
    prepare_benchmark("textvqa", raw, tmp_path / "out", questions=file)
    lines, gold = prepared(tmp_path / "out")
    assert [(q["question_id"], q["text"]) for q in lines] == [(3, text.format(3)), (1, text.format(1))]
    assert [record["question_id"] for record in gold["data"]] == [3, 1]


def test_the_authors_ocrvqa_sample_is_found_by_picture_and_question(make_raw, tmp_path):
    asked = [
        {"question_id": 17, "image": "b5.jpg", "text": "Which year?" + END, "answer": "1999"},
        {"question_id": 4, "image": "b2.png", "text": "who wrote this?" + END, "answer": "Author 2"},
    ]
    file = put_lines(tmp_path / "sampled_ocrvqa_test.jsonl", asked)
    prepare_benchmark("ocrvqa", make_raw("ocrvqa"), tmp_path / "out", questions=file)
    lines, gold = prepared(tmp_path / "out")
    assert [q["image"] for q in lines] == ["images/b5.jpg", "images/b2.png"]
    assert gold == [{"question_id": "b5_1", "answer": "1999"}, {"question_id": "b2_0", "answer": "Author 2"}]
    # The same file is the authors' annotation file.
    own = put_lines(tmp_path / "own.jsonl", [{"question_id": 17, "text": "1999"}, {"question_id": 4, "text": "x"}])
    assert score_files("ocrvqa", own, file)["score"] == 50


def test_the_authors_iconqa_answers_win_over_the_prepared_style(make_raw, tmp_path):
    asked = [{"question_id": 402, "image": "test/choose_txt/402/image.png", "text": "Pick.", "answer": "Answer: C"}]
    file = put_lines(tmp_path / "fixed_iconqa_txt-test.jsonl", asked)
    prepare_benchmark("iconqa", make_raw("iconqa"), tmp_path / "out", questions=file)
    lines, gold = prepared(tmp_path / "out")
    assert [(q["text"], q["image"]) for q in lines] == [("Pick.", "iconqa/test/choose_txt/402/image.png")]
    assert gold == [{"question_id": "402", "answer": "Answer: C"}]


@pytest.mark.parametrize("karpathy", [True, False])
def test_the_authors_caption_file_has_id_and_needs_either_caption_file(make_raw, tmp_path, karpathy):
    raw = make_raw("coco")
    asked = [{"id": i, "image": f"COCO_val2014_{i:012d}.jpg", "text": "Caption it."} for i in (9, 4)]
    file = put_lines(tmp_path / "llava_caption_mscoco_test.jsonl", asked)
    options: dict[str, Any] = {}
    if not karpathy:
        (raw / "dataset_coco.json").unlink()
        content = {
            "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in (4, 9, 14)],
            "annotations": [{"id": i, "image_id": i, "caption": f"caption {i} 0 "} for i in (4, 9, 14)],
        }
        (raw / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
        options = {"train_captions": "official"}
    prepare_benchmark("coco", raw, tmp_path / "out", questions=file, **options)
    lines, gold = prepared(tmp_path / "out")
    assert [(q["question_id"], q["image"]) for q in lines] == [
        (i, f"val2014/COCO_val2014_{i:012d}.jpg") for i in (9, 4)
    ]
    assert [i["id"] for i in gold["images"]] == [9, 4]
    assert gold["annotations"][0]["caption"] == "caption 9 0"


def test_okvqa_by_id(make_raw, tmp_path):
    asked = [{"question_id": 25, "image": "COCO_val2014_000000000002.jpg", "text": "What 2?" + END}]
    file = put_lines(tmp_path / "okvqa_val.jsonl", asked)
    prepare_benchmark("okvqa", make_raw("okvqa"), tmp_path / "out", questions=file)
    lines, gold = prepared(tmp_path / "out")
    assert [q["question_id"] for q in lines] == [record["question_id"] for record in gold["annotations"]] == [25]
