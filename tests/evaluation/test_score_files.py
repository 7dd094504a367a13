"""`llava-sculpt score`: the official evaluators' own results, official formats, odd ids, broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.score_files import score_files
from llava_sculpt.evaluation.scorers import caption
from tests.evaluation.make_golden_scores import differences

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_scores.json").read_text(encoding="utf-8"))
needs_ptb = pytest.mark.skipif(
    caption.ptb_obstacle() is not None, reason=f"needs the PTB tokenizer: {caption.ptb_obstacle()}"
)


def put(path: Path, content: Any) -> Path:
    """JSON, or JSON lines for a `.jsonl`."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["okvqa", "textvqa", "gqa", "ocrvqa", pytest.param("coco", marks=needs_ptb)])
def test_every_item_has_the_official_score(name, tmp_path):
    assert differences(name, GOLDEN[name], tmp_path) == []


def okvqa_file(folder: Path, answers: dict[int, str]) -> Path:
    records = [
        {"question_id": q, "image_id": q, "answers": [{"answer_id": i, "answer": text} for i in range(10)]}
        for q, text in answers.items()
    ]
    return put(folder / "gold.json", {"annotations": records})


def gqa_record(answer: str, balanced: bool = True) -> dict[str, Any]:
    return {"answer": answer, "isBalanced": balanced, "types": {"structural": "query"}, "question": "?"}


def test_the_command_prints_json_and_writes_each_item(tmp_path, capsys):
    gold = okvqa_file(tmp_path, {1: "dog", 2: "cat"})
    own = put(tmp_path / "own.json", [{"question_id": 1, "answer": "Dog"}, {"question_id": 2, "answer": "cow"}])
    command = ["score", "okvqa", "--predictions", str(own), "--annotations", str(gold)]
    assert main([*command, "--json", "--per_item", str(tmp_path / "new" / "items.jsonl")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["benchmark"] == "okvqa" and result["variant"] == "authors"
    assert (result["score"], result["n"], result["lenient"]) == (50, 2, False)
    items = [json.loads(line) for line in (tmp_path / "new" / "items.jsonl").read_text().splitlines()]
    assert items == [
        {"question_id": 1, "score": 100, "prediction": "Dog"},
        {"question_id": 2, "score": 0, "prediction": "cow"},
    ]
    assert main([*command, "--variant", "official"]) == 0
    assert capsys.readouterr().out == "okvqa: VQA accuracy 0.00 (n = 2; official)\n"


def test_question_files_restrict_what_is_scored(tmp_path):
    gold = okvqa_file(tmp_path, {1: "dog", 2: "cat", 3: "cow"})
    own = put(tmp_path / "own.jsonl", [{"question_id": 3, "text": "cow"}, {"question_id": 1, "text": "cat"}])
    official = put(tmp_path / "q.json", {"questions": [{"question_id": 1}, {"question_id": 3}]})
    lines = put(tmp_path / "q.jsonl", [{"question_id": 3, "text": "?"}, {"id": 1, "text": "?"}])
    for questions in (official, lines):
        assert score_files("okvqa", own, gold, questions=questions)["score"] == 50
    with pytest.raises(UserError, match="1 questions without a prediction: 2"):
        score_files("okvqa", own, gold)


def test_gqa_in_its_official_format_and_with_llavas_conversion(tmp_path):
    gold = put(tmp_path / "gold.json", {"a": gqa_record("yes"), "b": gqa_record("no"), "c": gqa_record("x", False)})
    own = put(
        tmp_path / "own.json",
        [{"questionId": "a", "prediction": "Yes.."}, {"questionId": "b", "prediction": "no"}],
    )
    assert score_files("gqa", own, gold)["score"] == 100
    official = score_files("gqa", own, gold, variant="official")
    assert official["score"] == 50 and official["open"] == 50 and "as they are" in official["variant"]


def test_textvqa_by_question_id_and_by_image_and_prompt(tmp_path):
    data = [
        {"question_id": n, "image_id": "00ab", "question": question, "answers": [answer] * 10}
        for n, (question, answer) in enumerate([("What?", "stop"), ("Where?", "here"), ("what?", "go")])
    ]
    gold = put(tmp_path / "gold.json", {"data": data})
    by_id = put(tmp_path / "a.jsonl", [{"question_id": n, "text": r["answers"][0]} for n, r in enumerate(data)])
    assert score_files("textvqa", by_id, gold)["score"] == 100
    # LLaVA's evaluator knows two questions that differ in case only as one, and takes the last.
    end = "\nAnswer the question using a single word or phrase."
    prompts = ["What?" + end, "Where?\nReference OCR token: A, B" + end, "OCR tokens: A. Question: what? Short answer:"]
    records = [{"question_id": "00ab", "prompt": p, "text": "go"} for p in prompts]
    assert score_files("textvqa", put(tmp_path / "b.jsonl", records), gold)["score"] == pytest.approx(200 / 3)
    records[1]["prompt"] = "Where?"
    with pytest.raises(UserError, match="line 2: the question id is an image id, but 'prompt' holds no question"):
        score_files("textvqa", put(tmp_path / "b.jsonl", records), gold)


def test_official_files_of_ocrvqa_iconqa_and_karpathy(tmp_path):
    book = {"questions": ["q", "r"], "answers": ["A b", "1999"], "split": 3, "imageURL": "x.jpg"}
    gold = put(tmp_path / "dataset.json", {"b1": book, "b2": {**book, "split": 1}})
    own = put(tmp_path / "own.jsonl", [{"question_id": "b1_0", "text": "a B"}, {"question_id": "b1_1", "text": "99"}])
    assert score_files("ocrvqa", own, gold)["score"] == 50

    problem = {"choices": ["cat", "dog"], "answer": 1, "ques_type": "choose_txt", "split": "test"}
    others = {"8": {**problem, "ques_type": "fill_in_blank"}, "9": {**problem, "split": "val"}}
    gold = put(tmp_path / "problems.json", {"7": problem, **others})
    for style, text in (("letter", "b"), ("answer_letter", "Answer: B"), ("text", "Dog")):
        own = put(tmp_path / "own.json", [{"question_id": "7", "text": text}])
        assert score_files("iconqa", own, gold, answer_style=style)["score"] == 100

    images = [
        {"cocoid": n, "split": "test" if n else "val", "sentences": [{"raw": text}]}
        for n, text in enumerate(["a red bus", "two dogs sleep", "one kite flies"])
    ]
    gold = put(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    own = put(tmp_path / "own.jsonl", [{"image_id": 1, "caption": "Two dogs."}, {"image_id": 2, "caption": "a kite"}])
    result = score_files("coco", own, gold, tokenizer="python")
    assert result["n"] == 2 and result["metric"] == "CIDEr (not PTB)" and result["score"] > 0


def test_lenient_about_ids_is_what_each_official_script_does(tmp_path):
    gold = okvqa_file(tmp_path, {1: "dog", 2: "cat"})
    twice = [{"question_id": 1, "text": "x"}, {"question_id": 2, "text": "cat"}, {"question_id": 1, "text": "dog"}]
    own = put(tmp_path / "own.jsonl", twice)
    with pytest.raises(UserError, match="1 predictions for a question that already has one: 1"):
        score_files("okvqa", own, gold)
    assert score_files("okvqa", own, gold, lenient=True)["score"] == 100  # the last wins
    with pytest.raises(UserError, match="without a prediction"):
        score_files("okvqa", put(tmp_path / "own.jsonl", twice[:1]), gold, lenient=True)

    gold = put(tmp_path / "gold.jsonl", [{"question_id": 1, "answer": "dog"}, {"question_id": 2, "answer": "cat"}])
    result = score_files("ocrvqa", put(tmp_path / "own.jsonl", twice), gold, lenient=True)
    assert (result["score"], result["n"]) == (pytest.approx(200 / 3), 3)  # every line counts
    assert score_files("iconqa", put(tmp_path / "own.jsonl", twice[1:]), gold, lenient=True)["n"] == 2
    assert score_files("iconqa", put(tmp_path / "own.jsonl", twice[2:]), gold, lenient=True)["score"] == 100
    unknown = put(tmp_path / "own.jsonl", [*twice, {"question_id": 3, "text": "x"}])
    with pytest.raises(UserError, match="unknown question ids: 3"):
        score_files("ocrvqa", unknown, gold, lenient=True)

    captions = {"images": [{"id": 1}, {"id": 2}], "annotations": [{"image_id": n, "caption": "a"} for n in (1, 2)]}
    own = put(tmp_path / "own.json", [{"image_id": 1, "caption": "a"}])
    with pytest.raises(UserError, match="without a prediction"):
        score_files("coco", own, put(tmp_path / "c.json", captions), lenient=True, tokenizer="python")


def test_lenient_annotations_with_one_id_are_what_each_official_script_makes_of_them(tmp_path):
    def score(name: str, gold: Any, own: list[Any]) -> float:
        annotations, predictions = tmp_path / "gold.json", put(tmp_path / "own.json", own)
        annotations.write_text(gold if isinstance(gold, str) else json.dumps(gold))
        with pytest.raises(UserError, match="occurs twice"):
            score_files(name, predictions, annotations, tokenizer="python")
        return score_files(name, predictions, annotations, lenient=True, tokenizer="python")["score"]

    own = [{"question_id": 1, "text": "dog"}, {"question_id": 2, "text": "cow"}]
    answers = {text: {"answers": [{"answer_id": i, "answer": text} for i in range(10)]} for text in ("dog", "cat")}
    records = [{"question_id": q, **answers[text]} for q, text in ((1, "cat"), (2, "cat"), (1, "dog"))]
    # VQA's evaluator goes through the annotations: question 1 counts twice, with its last answers.
    assert score("okvqa", {"annotations": records}, own) == pytest.approx(200 / 3)
    records = [{"question_id": q, "answers": [text] * 10} for q, text in ((1, "cat"), (2, "cat"), (1, "dog"))]
    assert score("textvqa", {"data": records}, own) == 50
    records = [{"question_id": q, "answer": text} for q, text in ((1, "cat"), (2, "cat"), (1, "dog"))]
    for name in ("ocrvqa", "iconqa"):
        assert score(name, records, own) == 50
    members = ", ".join(f'"{q}": {json.dumps(gqa_record(text))}' for q, text in (("a", "cat"), ("a", "dog")))
    assert score("gqa", f"{{{members}}}", [{"question_id": "a", "text": "dog"}]) == 100
    captions = [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "two red cats"}]
    own = [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "two red cats"}]
    images = {"images": [{"id": 1}, {"id": 2}, {"id": 1}], "annotations": captions}
    assert score("coco", images, own) > 0  # COCO's images are a dict by id


def test_ids_of_another_type_are_told_as_such(tmp_path):
    own = put(tmp_path / "own.jsonl", [{"question_id": "1", "text": "dog"}])
    with pytest.raises(UserError, match="some ids are numbers in one file and texts in the other"):
        score_files("okvqa", own, okvqa_file(tmp_path, {1: "dog"}))


def test_without_java_captions_are_refused_unless_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    gold = put(tmp_path / "c.json", {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]})
    own = put(tmp_path / "own.json", [{"image_id": 1, "caption": "a"}])
    command = ["score", "coco", "--predictions", str(own), "--annotations", str(gold)]
    assert main(command) == 2
    assert "CIDEr needs Java" in capsys.readouterr().err
    assert main([*command, "--tokenizer", "python"]) == 0
    assert "CIDEr (not PTB)" in capsys.readouterr().out


OKVQA = {"annotations": [{"question_id": 1, "answers": [{"answer_id": 1, "answer": "dog"}]}]}
TEXTVQA = {"data": [{"question_id": 1, "image_id": "a", "question": "q?", "answers": ["dog"] * 10}]}
COCO = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
BOOK = {"b": {"split": 3, "questions": ["q"], "answers": ["a"]}}
PROBLEM = {"7": {"choices": ["a", "b"], "answer": 0, "ques_type": "choose_txt", "split": "test"}}
OWN = '{"question_id": 1, "text": "dog"}'
BROKEN: list[tuple[str, Any, str | bytes | None, str]] = [
    # predictions
    ("okvqa", OKVQA, None, "own: file not found"),
    ("okvqa", OKVQA, b"\xff\xff", "own: cannot be read"),
    ("okvqa", OKVQA, "", "own: holds no records"),
    ("okvqa", OKVQA, "[]", "own: holds no records"),
    ("okvqa", OKVQA, "[{]", "own: not valid JSON (line 1, column 3"),
    ("okvqa", OKVQA, OWN + "\n" + OWN[:-3], "own: line 2: not valid JSON"),
    ("okvqa", OKVQA, OWN + "\n7", "own: line 2: expected an object, found int"),
    ("okvqa", OKVQA, "[" * 100_000, "own: not valid JSON"),
    ("okvqa", OKVQA, '{"question_id": ' + "1" * 5000 + "}", "own: line 1: not valid JSON (Exceeds the limit"),
    ("okvqa", OKVQA, '{"question_id": 1}', "line 1: needs the fields 'question_id' and 'text'"),
    ("okvqa", OKVQA, '{"text": "dog"}', "line 1: needs the fields"),
    ("okvqa", OKVQA, '{"question_id": 1.5, "text": "dog"}', "needs a number or a text under 'question_id'"),
    ("okvqa", OKVQA, '{"question_id": [1], "text": "dog"}', "needs a number or a text under 'question_id'"),
    ("okvqa", OKVQA, '{"question_id": 1, "text": null}', "field 'text' should be str, found NoneType"),
    ("okvqa", OKVQA, r'{"question_id": 1, "text": "\ud800"}', "half of a surrogate pair"),
    ("okvqa", OKVQA, OWN + "\n" + OWN, "1 predictions for a question that already has one: 1"),
    ("gqa", {"a": gqa_record("x")}, '[{"questionId": "a"}]', "entry 1: needs the fields"),
    # annotations
    ("okvqa", None, OWN, "gold: file not found"),
    ("okvqa", "{", OWN, "gold: not valid JSON"),
    ("okvqa", [1], OWN, "gold: should hold a JSON dict, found list"),
    ("okvqa", {"data": []}, OWN, "gold: no list of records under the key 'annotations'"),
    ("okvqa", {"annotations": [1]}, OWN, "annotation 0: expected an object, found int"),
    ("okvqa", {"annotations": OKVQA["annotations"] * 2}, OWN, "annotation 1: question_id 1 occurs twice"),
    ("okvqa", {"annotations": [{"question_id": 1, "answers": []}]}, OWN, "annotation 0: no answers"),
    ("okvqa", {"annotations": [{"question_id": 1, "answers": ["x"]}]}, OWN, "every answer needs a text"),
    ("textvqa", {"data": [{**TEXTVQA["data"][0], "answers": ["x"] * 9}]}, OWN, "needs exactly 10 answers"),
    ("textvqa", {"data": [{**TEXTVQA["data"][0], "image_id": 7}]}, OWN, "field 'image_id' should be str"),
    ("gqa", {"a": {**gqa_record("x"), "types": {}}}, '{"question_id": "a", "text": ""}', "no field 'structural'"),
    ("gqa", {"a": gqa_record("x", False)}, '{"question_id": "a", "text": ""}', "no gold answers to score against"),
    (
        "ocrvqa",
        {"b": {**BOOK["b"], "answers": []}},
        '{"question_id": "b_0", "text": ""}',
        "one answer, a text, for each",
    ),
    ("ocrvqa", {"b": {**BOOK["b"], "split": 1}}, '{"question_id": "b_0", "text": ""}', "no questions of split 3"),
    ("ocrvqa", [{"question_id": 1}], OWN, "entry 1: no field 'answer'"),
    ("iconqa", {"7": {**PROBLEM["7"], "answer": 2}}, '{"question_id": "7", "text": ""}', "answer 2 is no index"),
    ("iconqa", {"7": {**PROBLEM["7"], "split": "val"}}, '{"question_id": "7", "text": ""}', "no choose_txt problems"),
    ("coco", {**COCO, "annotations": [{"image_id": 2, "caption": "x"}]}, OWN, "image_id 2 is not among the images"),
    ("coco", {**COCO, "annotations": [{"image_id": 1}]}, OWN, "annotation 0: needs a text under 'caption'"),
    (
        "coco",
        {**COCO, "images": [{"id": 1}, {"id": 3}]},
        OWN + '\n{"image_id": 3, "caption": "x"}',
        "no reference caption",
    ),
]


@pytest.mark.parametrize(("name", "gold", "own", "expected"), BROKEN, ids=[f"{b[0]}: {b[3]}" for b in BROKEN])
def test_broken_files_have_one_message(name, gold, own, expected, tmp_path, capsys):
    if gold is not None:
        (tmp_path / "gold").write_text(gold if isinstance(gold, str) else json.dumps(gold))
    if own is not None:
        (tmp_path / "own").write_bytes(own.encode() if isinstance(own, str) else own)
    files = ["--predictions", str(tmp_path / "own"), "--annotations", str(tmp_path / "gold")]
    assert main(["score", name, *files, "--per_item", str(tmp_path / "items"), "--tokenizer", "python"]) == 2
    printed = capsys.readouterr()
    messages = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and expected in messages[0], messages
    assert printed.out == "" and not (tmp_path / "items").exists()
