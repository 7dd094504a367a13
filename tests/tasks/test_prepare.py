"""Raw official files -> prepared folders, for all six data sets."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest

from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.names import TASKS, TaskName
from llava_sculpt.tasks import prepare_benchmark, prepare_options
from llava_sculpt.tasks.coco import TRAIN_PROMPTS
from llava_sculpt.tasks.preparation import Preparation
from llava_sculpt.tasks.questions import Question

from .conftest import picture, put

NAMES = ["iconqa", "coco", "okvqa", "ocrvqa", "gqa", "textvqa"]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def edit(path: Path, change: Any) -> None:
    content = load(path)
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_question_has_its_image_and_the_manifest_tells_the_counts(make_raw, tmp_path, name):
    out = tmp_path / "out" / name
    manifest = prepare_benchmark(name, make_raw(name), out)
    assert manifest == load(out / "manifest.json")
    assert set(manifest["splits"]) == {"val", "test"} | ({"train"} if name in ("iconqa", "coco") else set())
    for split in ("val", "test"):
        questions = lines(out / f"{split}.jsonl")
        assert len(questions) == manifest["splits"][split]["n"] > 0
        assert len({q["question_id"] for q in questions}) == len(questions)
        for question in questions:
            assert set(question) == {"question_id", "image", "text", "category"}
            assert (out / manifest["image_folder"] / question["image"]).is_file()
            assert "<image>" not in question["text"]
    for key in ("seed", "samples", "prompt_style", "license", "source_files"):
        assert key in manifest


@pytest.mark.parametrize("name", NAMES)
def test_the_same_request_changes_nothing_and_another_is_refused(make_raw, tmp_path, name):
    raw, out = make_raw(name), tmp_path / "out"
    prepare_benchmark(name, raw, out, seed=0)
    before = snapshot(out)
    prepare_benchmark(name, raw, out, seed=0)
    assert snapshot(out) == before
    with pytest.raises(UserError, match="seed"):
        prepare_benchmark(name, raw, out, seed=1)
    assert snapshot(out) == before
    assert prepare_benchmark(name, raw, out, seed=1, overwrite=True)["seed"] == 1


def test_changed_sources_are_refused_and_a_damaged_output_is_rewritten(make_raw, tmp_path):
    raw, out = make_raw("gqa"), tmp_path / "out"
    prepare_benchmark("gqa", raw, out)
    good = (out / "test.jsonl").read_bytes()
    (out / "test.jsonl").write_text("broken")
    prepare_benchmark("gqa", raw, out)
    assert (out / "test.jsonl").read_bytes() == good
    edit(raw / "testdev_balanced_questions.json", lambda c: c["q0"].update(answer="no"))
    with pytest.raises(UserError, match="source_files"):
        prepare_benchmark("gqa", raw, out)


def test_overwriting_removes_files_of_the_former_request(make_raw, tmp_path):
    raw, out = make_raw("okvqa"), tmp_path / "out"
    prepare_benchmark("okvqa", raw, out)
    (raw / "mscoco_train2014_annotations.json").unlink()
    prepare_benchmark("okvqa", raw, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "test.jsonl", "test_annotations.json"]


def test_a_failed_write_leaves_no_manifest(make_raw, tmp_path, monkeypatch):
    from llava_sculpt.tasks import preparation

    real = preparation.write_atomically

    def full_disk(path: Path, content: bytes) -> None:
        if path.name.startswith("test_annotations"):
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(preparation, "write_atomically", full_disk)
    with pytest.raises(UserError, match="No space left"):
        prepare_benchmark("gqa", make_raw("gqa"), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_files_of_others_are_neither_deleted_nor_overwritten(make_raw, tmp_path):
    raw, out = make_raw("gqa"), tmp_path / "out"
    out.mkdir()
    for name in ("train.json", "test.jsonl"):
        (out / name).write_text("mine")
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    with pytest.raises(UserError, match=r"did not write: test\.jsonl, train\.json.*--overwrite"):
        prepare_benchmark("gqa", raw, out)
    assert snapshot(out) == before
    prepare_benchmark("gqa", raw, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and not (out / "train.json").exists()


def test_a_killed_preparation_is_continued(make_raw, tmp_path):
    raw, out = make_raw("gqa"), tmp_path / "out"
    prepare_benchmark("gqa", raw, out)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "manifest.json").unlink()  # written last
    (out / "test_annotations.json").unlink()
    (out / ".test_annotations.json.x1.writing").write_text("half")
    prepare_benchmark("gqa", raw, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_iconqa_letter_and_text_styles_agree_with_their_gold(make_raw, tmp_path):
    raw = make_raw("iconqa")
    for style, instruction, answers in (
        ("letter", "Answer with the option's letter from the given choices directly.", "ABC"),
        ("text", "Answer with the text of the correct choice.", ["cat", "dog", "sun"]),
    ):
        out = tmp_path / style
        prepare_benchmark("iconqa", raw, out, answer_style=style)
        first = load(out / "train.json")[1]
        assert first["conversations"][0]["value"] == f"<image>\nWhich 1?\nA. cat\nB. dog\nC. sun\n{instruction}"
        assert first["conversations"][1] == {"from": "gpt", "value": answers[1]}
        gold = load(out / "test_annotations.json")
        assert [g["answer"] for g in gold] == [answers[i % 3] for i in range(5)]
        assert [g["question_id"] for g in gold] == [q["question_id"] for q in lines(out / "test.jsonl")]


def test_iconqa_answer_letter_and_no_instruction(make_raw, tmp_path):
    out = tmp_path / "out"
    manifest = prepare_benchmark("iconqa", make_raw("iconqa"), out, answer_style="answer_letter", instruction=False)
    first = load(out / "train.json")[1]["conversations"]
    assert [turn["value"] for turn in first] == ["<image>\nWhich 1?\nA. cat\nB. dog\nC. sun", "Answer: B"]
    assert load(out / "test_annotations.json")[0]["answer"] == "Answer: A"
    assert manifest["prompt_style"] == "choices, answer by answer_letter, no instruction"
    assert manifest["source_counts"]["train"] == {"found": 12, "official": 18_946}


def test_samples_draws_a_fixed_seed_subset_of_train_only(make_raw, tmp_path):
    raw = make_raw("iconqa")
    drawn = {}
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_benchmark("iconqa", raw, tmp_path / run, samples=5, seed=seed)
        drawn[run] = [r["id"] for r in load(tmp_path / run / "train.json")]
        assert len(lines(tmp_path / run / "test.jsonl")) == 5
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert len(set(drawn["a"])) == 5
    prepare_benchmark("iconqa", raw, tmp_path / "all", samples=100)
    assert len(load(tmp_path / "all" / "train.json")) == 12


def test_coco_karpathy_splits_prompts_and_references(make_raw, tmp_path):
    prepare_benchmark("coco", make_raw("coco"), tmp_path / "out")
    train = load(tmp_path / "out" / "train.json")
    assert len(train) == 12  # train + restval
    for record in train:
        prompt = record["conversations"][0]["value"].removeprefix("<image>\n")
        assert prompt in TRAIN_PROMPTS
        assert record["conversations"][1]["value"].startswith(f"caption {record['id'].split('_')[1]} ")
    assert len({r["conversations"][0]["value"] for r in train}) > 1
    gold = load(tmp_path / "out" / "test_annotations.json")
    assert [i["id"] for i in gold["images"]] == [4, 9, 14, 19]
    assert len(gold["annotations"]) == 20
    question = lines(tmp_path / "out" / "test.jsonl")[0]
    assert question["question_id"] == 4
    assert question["text"] == "Provide a one-sentence caption for the provided image."


def test_coco_official_captions_train_alone(make_raw, tmp_path):
    raw = make_raw("coco")
    (raw / "dataset_coco.json").unlink()
    with pytest.raises(UserError, match=r"dataset_coco\.json.*train_captions official"):
        prepare_benchmark("coco", raw, tmp_path / "out")
    manifest = prepare_benchmark("coco", raw, tmp_path / "out", train_captions="official")
    assert manifest["splits"] == {"train": {"n": 8}}
    assert load(tmp_path / "out" / "train.json")[0]["conversations"][1]["value"].startswith("official 0 ")


def test_source_splits_without_their_optional_file_have_only_test(make_raw, tmp_path):
    raw = make_raw("gqa")
    (raw / "val_balanced_questions.json").unlink()
    assert prepare_benchmark("gqa", raw, tmp_path / "out")["splits"] == {"test": {"n": 4}}


def test_ocrvqa_samples_test_questions_and_keeps_extensions(make_raw, tmp_path):
    manifest = prepare_benchmark("ocrvqa", make_raw("ocrvqa"), tmp_path / "out", test_samples=4)
    assert manifest["splits"] == {"val": {"n": 6}, "test": {"n": 4}}
    for question in lines(tmp_path / "out" / "test.jsonl"):
        number = int(question["question_id"][1])
        assert number % 3 == 2
        assert question["image"] == f"images/b{number}.{'jpg' if number % 2 else 'png'}"
        assert question["text"].endswith("\nAnswer the question using a single word or phrase.")


def test_textvqa_prompt_with_and_without_ocr_tokens(make_raw, tmp_path):
    raw = make_raw("textvqa")
    end = "\nAnswer the question using a single word or phrase."
    with_ocr = prepare_benchmark("textvqa", raw, tmp_path / "with")
    assert lines(tmp_path / "with/test.jsonl")[1]["text"] == f"what 1?\nReference OCR token: STOP, now{end}"
    (raw / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(UserError, match=r"TextVQA_Rosetta_OCR_v0\.2_val\.json.*ocr_tokens"):
        prepare_benchmark("textvqa", raw, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    without = prepare_benchmark("textvqa", raw, tmp_path / "without", ocr_tokens=False)
    assert lines(tmp_path / "without/test.jsonl")[1]["text"] == f"what 1?{end}"
    assert with_ocr["prompt_style"] != without["prompt_style"]


def test_all_problems_are_told_at_once_with_file_and_record(make_raw, tmp_path):
    raw = make_raw("iconqa")
    root = raw / "iconqa_data/iconqa/test/choose_txt"
    edit(root / "400/data.json", lambda r: r.update(answer=3))
    edit(root / "401/data.json", lambda r: r.update(choices=["one"]))
    edit(root / "402/data.json", lambda r: r.pop("question"))
    (root / "403/image.png").write_bytes(b"")
    (root / "404/data.json").write_text("{")
    with pytest.raises(UserError) as caught:
        prepare_benchmark("iconqa", raw, tmp_path / "out")
    for pid, part in (
        ("400", "answer 3"),
        ("401", "choices"),
        ("402", "question"),
        ("403", "0 bytes"),
        ("404", "not valid JSON"),
    ):
        assert any(pid in problem and part in problem for problem in caught.value.problems), pid
    assert len(caught.value.problems) == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "file", "change", "expected"),
    [
        ("okvqa", "mscoco_val2014_annotations.json", lambda c: c["annotations"].pop(), "no entry in"),
        ("okvqa", "mscoco_val2014_annotations.json", lambda c: c.update(annotations={}), "'annotations'"),
        (
            "okvqa",
            "OpenEnded_mscoco_val2014_questions.json",
            lambda c: c["questions"].append(c["questions"][0]),
            "occurs twice",
        ),
        (
            "okvqa",
            "OpenEnded_mscoco_val2014_questions.json",
            lambda c: c["questions"].pop(),
            "has no question",
        ),
        (
            "ocrvqa",
            "dataset.json",
            lambda c: c["b2"]["answers"].pop(),
            "record b2: 2 questions but 1 answers",
        ),
        ("ocrvqa", "dataset.json", lambda c: c["b2"].update(split=4), "record b2: split"),
        ("ocrvqa", "dataset.json", lambda c: c.update(b2="x"), "record b2: expected an object"),
        ("gqa", "testdev_balanced_questions.json", lambda c: c["q1"].update(isBalanced="yes"), "question q1"),
        (
            "gqa",
            "testdev_balanced_questions.json",
            lambda c: c["q1"].update(imageId="gone"),
            "image not found",
        ),
        ("gqa", "testdev_balanced_questions.json", lambda c: c["q1"].update(question=" "), "is empty"),
        ("gqa", "testdev_balanced_questions.json", lambda c: c.clear(), "holds no records"),
        (
            "textvqa",
            "TextVQA_0.5.1_val.json",
            lambda c: c["data"][2]["answers"].pop(),
            "record 2: needs exactly 10",
        ),
        (
            "textvqa",
            "TextVQA_Rosetta_OCR_v0.2_val.json",
            lambda c: c["data"].pop(),
            "no OCR tokens for image val3",
        ),
        (
            "coco",
            "dataset_coco.json",
            lambda c: c["images"][3].update(split="odd"),
            "image record 3: unknown split",
        ),
        ("coco", "dataset_coco.json", lambda c: c["images"][3].update(sentences=[]), "no sentences"),
        ("iconqa", "iconqa_data/pid_splits.json", lambda c: c.pop("choose_txt_val"), "choose_txt_val"),
        (
            "gqa",
            "testdev_balanced_questions.json",
            lambda c: c["q1"].update(question="a <image>?"),
            "<image>",
        ),
    ],
)
def test_malformed_records_are_named(make_raw, tmp_path, name, file, change, expected):
    raw = make_raw(name)
    edit(raw / file, change)
    with pytest.raises(UserError) as caught:
        prepare_benchmark(name, raw, tmp_path / "out")
    assert expected in str(caught.value)
    assert str(raw) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_random_damage_never_gives_a_traceback(make_raw, tmp_path):
    raw = make_raw("textvqa")
    file = raw / "TextVQA_0.5.1_val.json"
    good = file.read_bytes()
    rng = random.Random(0)
    for trial in range(60):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(bytes(damaged[: rng.randrange(len(damaged))]) if trial % 3 == 0 else bytes(damaged))
        try:  # only a UserError may come out
            prepare_benchmark("textvqa", raw, tmp_path / f"out{trial}")
        except UserError:
            assert not (tmp_path / f"out{trial}").exists()


def test_long_lists_of_problems_are_cut_with_a_count(make_raw, tmp_path):
    raw = make_raw("gqa")
    content = {f"q{i}": {"question": "?"} for i in range(100)}
    (raw / "testdev_balanced_questions.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        prepare_benchmark("gqa", raw, tmp_path / "out")
    assert len(caught.value.problems) == 21
    assert "380 more" in caught.value.problems[-1]


def test_unknown_names_options_and_folders_are_user_errors(make_raw, tmp_path):
    raw = make_raw("gqa")
    for call in (
        lambda: prepare_benchmark("vqa", raw, tmp_path / "o"),
        lambda: prepare_benchmark("gqa", raw, tmp_path / "o", answer_style="text"),
        lambda: prepare_benchmark("gqa", tmp_path / "nowhere", tmp_path / "o"),
        lambda: prepare_benchmark("gqa", raw, tmp_path / "o", val_samples=0),
        lambda: prepare_benchmark("iconqa", make_raw("iconqa"), tmp_path / "o", answer_style="number"),
        lambda: prepare_benchmark("okvqa", raw, tmp_path / "o"),
    ):
        with pytest.raises(UserError):
            call()
    assert prepare_options("textvqa")["ocr_tokens"].default is True


def prepare_toy(job: Preparation, *, ending: Annotated[Literal["?", "!"], "of every question"] = "?") -> dict[str, Any]:
    file = job.require("toy.json")
    known = [Question(q, ("a.png",), q, q + ending, "yes") for q in load(file)]
    job.ask("test", job.draw("test", known, 7), file)
    return job.write("toy", "none")


def test_a_data_set_is_one_module_and_one_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "toy", TaskName("Toy", "source", "exact"))
    monkeypatch.setitem(sys.modules, "llava_sculpt.tasks.toy", SimpleNamespace(prepare=prepare_toy))
    picture(tmp_path / "a.png")
    put(tmp_path / "toy.json", ["one", "two"])
    command = ["prepare", "toy", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--ending", "!"]) == 0
    assert [line["text"] for line in lines(tmp_path / "out/test.jsonl")] == ["one!", "two!"]
    assert load(tmp_path / "out/manifest.json")["options"] == {"ending": "!", "val_samples": 1000}
    assert "the raw files hold 2, the official release 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["prepare", "toy", "--help"])
    assert "of every question (default: ?)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as wrong:  # a flag of another data set
        main([*command, "--answer_style", "text"])
    assert wrong.value.code == 2


def test_the_command_notes_counts_that_are_not_the_official_ones(make_raw, tmp_path, capsys):
    raw = make_raw("gqa")
    assert main(["prepare", "gqa", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "val 6, test 4" in printed.out
    assert "note: test: the raw files hold 4, the official release 12,578" in printed.err
