"""`llava-sculpt check-data`: lengths, what is trained on, and broken training files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_sculpt.cli import main
from llava_sculpt.data.check import check_data, marked_text
from llava_sculpt.data.conversation import SYSTEM, encode_record
from llava_sculpt.data.tokenizer import LlavaTokenizer

IMAGE_TOKENS = 4  # of the random checkpoint


def record(question: str = "Which?", answer: str = "B", image: str | None = "a.png", **more: Any) -> dict[str, Any]:
    value = question if image is None else f"<image>\n{question}"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": "r", **({"image": image} if image else {}), "conversations": turns, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images" / "a.png")
    return tmp_path


def run(folder: Path, checkpoint: Path, *flags: str) -> int:
    images = str(folder / "images")
    return main(
        ["check-data", str(folder / "train.json"), "--image_folder", images, "--model", str(checkpoint), *flags]
    )


def test_lengths_are_those_of_training_and_the_labels_cover_the_answers(folder, tokenizer):
    records = [record(), record("Say it.", "A long answer, in words.", None), record("What?", "a a")]
    records[2]["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "Nothing."}]
    (folder / "train.json").write_text(json.dumps(records))
    found = check_data(folder / "train.json", folder / "images", tokenizer, IMAGE_TOKENS, samples=10)
    assert (found["records"], found["with_image"], found["images"], found["answers"]) == (3, 2, 1, 4)
    lengths = []
    for sample, original in zip(found["samples"], records, strict=True):
        ids, labels = encode_record(original, tokenizer)
        assert (sample["input_ids"], sample["labels"]) == (ids, labels)
        assert ids.count(-200) == ("image" in original)
        lengths.append(len(ids) + (IMAGE_TOKENS - 1) * ("image" in original))
        assert sample["length"] == lengths[-1]
    assert found["tokens"] == sum(lengths)
    assert found["length_percentiles"] == dict(
        zip(("0", "50", "90", "99", "100"), sorted(lengths) + [max(lengths)] * 2, strict=True)
    )
    assert found["longest"][0]["length"] == max(lengths)
    assert found["trained_on_tokens"] == sum(label != -100 for s in found["samples"] for label in s["labels"])
    assert found["samples"][2]["text"] == (
        f"<s> {SYSTEM} USER: <image>\nWhat? ASSISTANT: ⟦a a</s>⟧USER: And? ASSISTANT: ⟦Nothing.</s>⟧"
    )


def test_records_that_are_cut_are_counted(folder, tokenizer):
    (folder / "train.json").write_text(json.dumps([record(), record(answer="word " * 50)]))
    whole = check_data(folder / "train.json", folder / "images", tokenizer, IMAGE_TOKENS)
    short = whole["length_percentiles"]["0"]
    cut = check_data(folder / "train.json", folder / "images", tokenizer, IMAGE_TOKENS, model_max_length=short)
    assert whole["truncated"] == {"records": 0, "tokens_lost": 0}
    assert cut["truncated"] == {"records": 1, "tokens_lost": whole["length_percentiles"]["100"] - short}


@pytest.mark.parametrize("answer", ["é 中文 😀", " B", "x  y", "a\nb"])
def test_marked_text_is_the_text_whatever_the_letters(tokenizer: LlavaTokenizer, answer: str):
    ids, labels = encode_record(record(answer=answer), tokenizer)
    text = marked_text(ids, labels, tokenizer)
    assert text.count("⟦") == text.count("⟧") == 1
    assert text.split("⟦")[1] == answer.lstrip(" ") + "</s>⟧"


def test_the_command_for_people_and_programs(folder, checkpoint, capsys):
    (folder / "train.json").write_text(json.dumps([record()] * 5))
    assert run(folder, checkpoint, "--samples", "1") == 0
    printed = capsys.readouterr().out
    assert "5 records are sound, 5 with an image (1 files, all readable)" in printed and "⟦B</s>⟧" in printed
    assert run(folder, checkpoint, "--json", "--samples", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert [sample["record"] for sample in found["samples"]] == [1, 3] and -200 in found["samples"][0]["input_ids"]


LONG = "word " * 3000
BROKEN: list[tuple[Any, str]] = [
    (None, "train.json: file not found"),
    (b"\xff\xfe", "cannot be read: 'utf-8' codec"),
    (b"[{}", "not valid JSON (line 1, column"),
    (b'{"id": 1}\n{"id": 2}', "JSON lines are not read"),
    (b"[" * 100_000, "nested too deeply"),
    (b'[{"id": ' + b"1" * 5000 + b"}]", "not valid JSON (Exceeds the limit"),
    ({}, "must hold a JSON list"),
    ([], "holds no samples"),
    ([7], "record 1 of 1: is not a JSON object but int"),
    ([record(), record(image="gone.png", id="x")], "record 2 of 2 (id 'x'): the image is missing"),
    ([record(image="broken.png")], "the image file is cut short or damaged"),
    ([record(image=["a.png"])], "'image' must be a file name"),
    ([record(conversations=[])], "has no 'conversations'"),
    ([record(conversations=[{"from": "user", "value": "x"}])], "turn 1 needs 'from': 'human' or 'gpt'"),
    ([record(answer="")], "answer 1 is empty"),
    ([record(answer="<image>")], "has <image> in an answer"),
    ([record(conversations=2 * record()["conversations"])], "has <image> in 2 places"),
    ([record("x ASSISTANT: y")], "' ASSISTANT: ' occurs in the text"),
    ([record("a \ud800")], "half of a surrogate pair"),
    ([record(LONG)], "the first answer is at token"),
]


@pytest.mark.parametrize(("content", "expected"), BROKEN, ids=[expected for _, expected in BROKEN])
def test_broken_training_files_have_one_message(content, expected, folder, checkpoint, capsys):
    whole = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "broken.png").write_bytes(whole[:-20])
    if content is not None:
        (folder / "train.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert run(folder, checkpoint) == 2
    printed = capsys.readouterr()
    messages = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and expected in messages[0], messages
    assert printed.out == ""


def test_a_model_without_weights_is_enough_but_a_tokenizer_is_needed(folder, checkpoint, tmp_path, capsys):
    (folder / "train.json").write_text(json.dumps([record()]))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.model", "preprocessor_config.json"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    assert run(folder, bare) == 0
    (bare / "tokenizer.model").unlink()
    assert run(folder, bare) == 2
    assert "tokenizer.model is missing" in capsys.readouterr().err
