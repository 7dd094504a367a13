"""Kinds of broken raw files and question files: each yields its one message, no traceback and no output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_sculpt.cli import main

Damage = Callable[[Path], None]

ICON = "iconqa_data/iconqa/test/choose_txt/400"
SPLITS = "iconqa_data/pid_splits.json"
KARPATHY, CAPTIONS = "dataset_coco.json", "annotations/captions_train2014.json"
QUESTIONS, ANNOTATIONS = "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"
BOOKS, GQA = "dataset.json", "testdev_balanced_questions.json"
TEXTVQA, OCR = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    """`change` works on the parsed JSON of file `name`, in place."""

    def damage(raw: Path) -> None:
        content = json.loads((raw / name).read_text())
        change(content)
        (raw / name).write_text(json.dumps(content))

    return damage


def cut(name: str, keep: float = 0.5) -> Damage:
    def damage(raw: Path) -> None:
        content = (raw / name).read_bytes()
        (raw / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def write(name: str, content: bytes) -> Damage:
    def damage(raw: Path) -> None:
        (raw / name).write_bytes(content)

    return damage


def append(name: str, content: bytes) -> Damage:
    return lambda raw: write(name, (raw / name).read_bytes() + content)(raw)


def gone(name: str) -> Damage:
    return lambda raw: (raw / name).unlink()


def first(content: dict[str, Any]) -> Any:
    return next(iter(content.values()))


CASES: list[tuple[str, Damage, str]] = [
    # IconQA
    ("iconqa", gone(SPLITS), "pid_splits.json: file not found"),
    ("iconqa", write(SPLITS, b""), "pid_splits.json: not valid JSON (line 1, column 1"),
    ("iconqa", edit(SPLITS, lambda c: c.pop("choose_txt_train")), "no field 'choose_txt_train'"),
    ("iconqa", edit(SPLITS, lambda c: c.update(choose_txt_val="400")), "field 'choose_txt_val' should be list"),
    ("iconqa", edit(SPLITS, lambda c: c["choose_txt_test"].append("400")), "lists a problem id twice"),
    ("iconqa", edit(SPLITS, lambda c: c["choose_txt_test"].append("999")), "999/data.json: "),
    ("iconqa", gone(f"{ICON}/image.png"), "image not found"),
    ("iconqa", write(f"{ICON}/image.png", b""), "the image file is empty (0 bytes)"),
    ("iconqa", cut(f"{ICON}/image.png", 0.7), "cut short or damaged"),
    ("iconqa", write(f"{ICON}/image.png", b"<html>404</html>"), "not an image that Pillow can read"),
    ("iconqa", edit(f"{ICON}/data.json", lambda c: c.update(answer=True)), "field 'answer' should be int, found bool"),
    ("iconqa", edit(f"{ICON}/data.json", lambda c: c.update(answer=-1)), "answer -1 is no index"),
    ("iconqa", edit(f"{ICON}/data.json", lambda c: c.update(choices=["a"] * 27)), "27 choices, but there are only 26"),
    ("iconqa", edit(f"{ICON}/data.json", lambda c: c.update(choices=["a", None])), "'choices', entry 1"),
    ("iconqa", edit(f"{ICON}/data.json", lambda c: c.update(question="a \ud800?")), "half of a surrogate pair"),
    # COCO
    ("coco", gone(KARPATHY), "dataset_coco.json: file not found"),
    ("coco", cut(KARPATHY), "dataset_coco.json: not valid JSON"),
    ("coco", edit(KARPATHY, lambda c: c.pop("images")), "no list of records under the key 'images'"),
    ("coco", edit(KARPATHY, lambda c: c["images"].append(c["images"][0])), "cocoid 0 occurs twice"),
    ("coco", edit(KARPATHY, lambda c: c["images"][4].pop("filename")), "image record 4: no field 'filename'"),
    ("coco", edit(KARPATHY, lambda c: c["images"][4]["sentences"][1].pop("raw")), "image record 4, sentence 1"),
    (
        "coco",
        edit(KARPATHY, lambda c: [i.update(split="train") for i in c["images"] if i["split"] == "val"]),
        "no images of split 'val'",
    ),
    ("coco", gone("val2014/COCO_val2014_000000000004.jpg"), "question 4: image not found"),
    ("coco", cut("val2014/COCO_val2014_000000000004.jpg"), "cut short or damaged"),
    ("coco --train_captions official", gone(CAPTIONS), "captions_train2014.json: file not found"),
    (
        "coco --train_captions official",
        edit(CAPTIONS, lambda c: c["annotations"][0].update(image_id=99)),
        "image_id 99",
    ),
    # OK-VQA
    ("okvqa", gone(ANNOTATIONS), "mscoco_val2014_annotations.json: file not found"),
    ("okvqa", write(QUESTIONS, b"\xff\xfe\x00"), "cannot be read: 'utf-8' codec"),
    ("okvqa", edit(QUESTIONS, lambda c: c["questions"][0].update(question_id="5")), "'question_id' should be int"),
    ("okvqa", edit(QUESTIONS, lambda c: c["questions"][0].update(image_id=None)), "'image_id' should be int"),
    ("okvqa", edit(ANNOTATIONS, lambda c: c["annotations"][1].update(answers=[])), "annotation 1: no answers"),
    ("okvqa", edit(ANNOTATIONS, lambda c: c["annotations"][1]["answers"][3].pop("answer")), "needs a text under"),
    ("okvqa", edit(ANNOTATIONS, lambda c: c["annotations"][1]["answers"][3].update(answer="\udc00")), "surrogate"),
    ("okvqa", edit(ANNOTATIONS, lambda c: c["annotations"].append(c["annotations"][0])), "question_id 5 occurs twice"),
    # OCR-VQA
    ("ocrvqa", write(BOOKS, b"[]"), "dataset.json: should hold a JSON object"),
    ("ocrvqa", write(BOOKS, b"{}"), "dataset.json: holds no records"),
    ("ocrvqa", cut(BOOKS, 0.8), "dataset.json: not valid JSON (line 1, column"),
    ("ocrvqa", write(BOOKS, b'{"b1": ' + b"[" * 100_000), "nested too deeply"),
    ("ocrvqa", write(BOOKS, b'{"b1": ' + b"1" * 5000 + b"}"), "not valid JSON (line 1, column 8: Exceeds the limit"),
    ("ocrvqa", edit(BOOKS, lambda c: c["b2"].pop("imageURL")), "record b2: no field 'imageURL'"),
    ("ocrvqa", edit(BOOKS, lambda c: c["b2"]["answers"].__setitem__(1, 1999)), "record b2, question 1"),
    ("ocrvqa", edit(BOOKS, lambda c: [b.update(split=1) for b in c.values()]), "no questions of split 3 (test)"),
    # GQA
    ("gqa", append(GQA, b' {"q1": {}}'), "text behind the end"),
    ("gqa", edit(GQA, lambda c: first(c).pop("types")), "question q0: no field 'types'"),
    ("gqa", edit(GQA, lambda c: first(c).update(answer=1)), "question q0: field 'answer' should be str"),
    ("gqa", write("val_balanced_questions.json", b'{"q": '), "val_balanced_questions.json: not valid JSON"),
    # TextVQA
    ("textvqa", gone(OCR), "The option ocr_tokens is on and needs it"),
    ("textvqa", edit(OCR, lambda c: c["data"][1].update(ocr_tokens="STOP")), "'ocr_tokens' should be list"),
    (
        "textvqa",
        edit(TEXTVQA, lambda c: c["data"][1]["answers"].__setitem__(0, 7)),
        "record 1: needs exactly 10 answers",
    ),
    ("textvqa", edit(TEXTVQA, lambda c: c["data"].append(c["data"][0])), "question_id 0 occurs twice"),
]


@pytest.mark.parametrize(("arguments", "damage", "expected"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES])
def test_broken_raw_files(make_raw, tmp_path, capsys, arguments, damage, expected):
    name, *flags = arguments.split()
    raw = make_raw(name)
    damage(raw)
    refused(["prepare", name, "--raw", str(raw), "--out", str(tmp_path / "out"), *flags], expected, tmp_path, capsys)


GOOD = {"question_id": "q0", "image": "n0.jpg", "text": "Is it 0?\nAnswer briefly.", "category": "default"}
QUESTION_FILES: list[tuple[bytes | None, str]] = [
    (None, "file not found"),
    (b"", "holds no records"),
    (b"\x80", "cannot be read"),
    (b'{"question_id": "q0"', "line 1: not valid JSON"),
    (b'"q0"\n', "line 1: expected an object, found str"),
    (json.dumps({**GOOD, "question_id": None}).encode(), "line 1: needs a number or a text under 'question_id'"),
    (json.dumps({k: v for k, v in GOOD.items() if k != "image"}).encode(), "line 1: no field 'image'"),
    (json.dumps({**GOOD, "text": "<image>\nIs it 0?"}).encode(), "reserved text '<image>'"),
    (json.dumps({**GOOD, "image": "other.jpg"}).encode(), "'q0' about other.jpg is not in the official file"),
    (b"\n".join([json.dumps(GOOD).encode()] * 2), "line 2: question 'q0' about n0.jpg occurs twice"),
]


@pytest.mark.parametrize(("content", "expected"), QUESTION_FILES, ids=[expected for _, expected in QUESTION_FILES])
def test_broken_question_files(make_raw, tmp_path, capsys, content, expected):
    file = tmp_path / "questions.jsonl"
    if content is not None:
        file.write_bytes(content)
    raw = make_raw("gqa")
    command = ["prepare", "gqa", "--raw", str(raw), "--out", str(tmp_path / "out"), "--questions", str(file)]
    refused(command, expected, tmp_path, capsys)


def refused(command: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one message with `expected`; nothing is written."""
    before = set(tmp_path.rglob("*"))
    assert main(command) == 2
    printed = capsys.readouterr()
    messages = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, messages
    assert expected in messages[0]
    assert printed.out == ""
    assert set(tmp_path.rglob("*")) == before
