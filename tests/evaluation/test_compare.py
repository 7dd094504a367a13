"""`llava-sculpt compare`: what is forgotten and learned, the page, and everything that may not stand together."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation import compare_page
from llava_sculpt.evaluation.compare import KINDS, Comparison, compare, kind_of
from llava_sculpt.evaluation.compare_page import PAGE_BYTES, SHOWN, write_page
from llava_sculpt.evaluation.prepared import load_tasks
from llava_sculpt.evaluation.run import summarise

IDS = {"gqa": [f"gqa{n}" for n in range(4)], "okvqa": [1, 2, 3, 4], "coco": [7, 8, 9]}
GOLD = {
    "gqa": {q: {"answer": "yes", "isBalanced": True, "types": {"structural": "verify"}} for q in IDS["gqa"]},
    "okvqa": {
        "annotations": [
            {"question_id": q, "answers": [{"answer_id": n, "answer": "dog" if n < 7 else "puppy"} for n in range(10)]}
            for q in IDS["okvqa"]
        ]
    },
    "coco": {
        "images": [{"id": q} for q in IDS["coco"]],
        "annotations": [{"image_id": q, "caption": f"a red dog on street number {q}"} for q in IDS["coco"]],
    },
}
# One question of each kind, in the order of KINDS: (reference, tuned).
ANSWERS = {
    "gqa": [("yes", "no"), ("no", "yes"), ("no", "maybe"), ("yes", "Yes.")],
    "okvqa": [("puppy", "cat"), ("cat", "dog"), ("", "cat"), ("dog", "dog")],
    "coco": [("a red dog on street number 7", "cat"), ("cat", "a red dog on street number 8"), ("cat", "bike")],
}
Evaluated = Callable[..., Path]


@pytest.fixture
def evaluated(prepare_task, tmp_path, monkeypatch) -> Evaluated:
    """`evaluated(name, place)` writes a folder as `evaluate` does, with the answers at `place` of ANSWERS."""
    monkeypatch.setenv("PATH", "")  # captions are tokenized in Python
    monkeypatch.chdir(tmp_path)
    for name, ids in IDS.items():
        prepare_task(name, GOLD[name], ids)

    def write(name: str, place: int, names: tuple[str, ...] = tuple(IDS), **results: Any) -> Path:
        folder, scored = tmp_path / name, {}
        (folder / "predictions").mkdir(parents=True)
        tasks = load_tasks(names, tmp_path / "data", "test")
        for task in tasks:
            pairs = [(q, pair[place]) for q, pair in zip(IDS[task.name], ANSWERS[task.name], strict=True)]
            lines = [json.dumps({"question_id": q, "text": text}) + "\n" for q, text in pairs]
            (folder / "predictions" / f"{task.name}.jsonl").write_text("".join(lines))
            score = task.scorer.score(task.gold, pairs, "authors", None)
            entry = {"split": "test", "prompt_style": task.prompt_style, "decoding": "greedy", "n": score.n}
            scored[task.name] = {**entry, "score": score.score, "metric": score.metric, "variant": score.variant}
        content = {
            "model_id": name,
            "base": "abc",
            "tasks": scored,
            **summarise({task: entry["score"] for task, entry in scored.items()}, None),
            "settings": {
                **{"split": "test", "max_new_tokens": 16, "prompt_styles": {}, "scorers": {}},
                "data": {task.name: task.fingerprint for task in tasks},
            },
            "config_hash": "",
            "versions": {},
            **results,
        }
        (folder / "results.json").write_text(json.dumps(content))
        return folder

    return write


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text of every card."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "article":
            self.cards.append("")

    def handle_data(self, data: str) -> None:
        if self.cards:
            self.cards[-1] += data


def test_every_kind_is_found_in_every_task(evaluated):
    found = compare([evaluated("base", 0), evaluated("tuned", 1)])
    assert found.tasks == ["coco", "okvqa", "gqa"]
    for task in ("gqa", "okvqa"):
        items = [item for item in found.items if item.task == task]
        assert [item.kinds for item in items] == [[kind] for kind in KINDS]
        assert found.counts(1, task) == dict.fromkeys(KINDS, 1)
    assert [item.kinds[0] for item in found.items if item.task == "coco"] == ["forgotten", "learned", "wrong"]
    assert found.counts(1) == {"forgotten": 3, "learned": 3, "wrong": 3, "right": 2}
    first = next(item for item in found.items if item.task == "okvqa")
    assert first.gold == [("dog", 7), ("puppy", 3)]
    assert [(a.text, round(a.score), a.right) for a in first.answers] == [("puppy", 90, True), ("cat", 0, False)]


@pytest.mark.parametrize(
    ("before", "after", "right_from", "kind"),
    [
        (60, 30, 50, "forgotten"),  # VQA accuracy of two annotators of ten, of one
        (30, 60, 50, "learned"),
        (60, 100, 50, "right"),
        (0, 30, 50, "wrong"),
        (200, 100, None, "forgotten"),
        (200, 101, None, "right"),
        (30, 11, None, "wrong"),  # less than half, but by few points
        (0, 20, None, "learned"),
        (60, 45, None, "right"),
        (0, 0, None, "wrong"),
    ],
)
def test_the_rule_for_forgotten_and_learned(before, after, right_from, kind):
    assert kind_of(before, after, right_from) == kind


def test_the_command_prints_table_and_counts_and_writes_the_page(evaluated, tmp_path, capsys):
    folders = [str(evaluated("base", 0)), str(evaluated("tuned", 1)), str(evaluated("third", 0, ("gqa", "okvqa")))]
    assert main(["compare", *folders, "--out", str(tmp_path / "new" / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert (
        "tuned against base, questions:\n  OKVQA: forgotten 1, learned 1, both wrong 1, both right 1 (of 4)" in printed
    )
    assert re.search(r"^tuned +50.00 +- +50.00 +- ", printed, re.MULTILINE)
    assert "Left out, because not every model was scored on it: COCO-Caption." in printed
    page = Page(tmp_path / "new" / "page.html")
    assert len(page.cards) == 8
    assert sum("Forgotten" in card and "dog ×7" in card for card in page.cards) == 1
    assert '"forgotten": 2' in page.source and "empty answer" in page.source
    # Nothing from elsewhere, and one rule for each of the four pictures.
    links = [attrs.get(key, "") for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "http" not in re.sub(r"data:[^)\"]*", "", page.source).replace("http-equiv", "")
    assert page.source.count("background-image:url(") == 4
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


def test_whatever_a_text_holds_is_text(evaluated, tmp_path):
    evil = "<script>alert(1)</script> \"a\" 'b' & </style> {{ 7 * 7 }} \ud800"
    found = compare([evaluated("base", 0), evaluated("tuned", 1)])
    answers = [dataclasses.replace(answer, text=evil) for answer in found.items[0].answers]
    item = dataclasses.replace(found.items[0], question=evil, gold=[(evil, 2)], answers=answers)
    labels = ["base", f"</title>{evil}"]
    write_page(dataclasses.replace(found, labels=labels, items=[item], notes=[evil]), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.cards[0].count("<script>alert(1)</script> \"a\" 'b' & </style> {{ 7 * 7 }} ?") == 5


def many(found: Comparison, count: int, files: list[Path]) -> Comparison:
    """`count` questions of long texts about the pictures."""
    items = []
    for n in range(count):
        template = found.items[n % len(found.items)]
        answers = [dataclasses.replace(answer, text=f"{n} " + "answer " * 30) for answer in template.answers]
        items.append(dataclasses.replace(template, question_id=n, image=files[n % len(files)], answers=answers))
    return dataclasses.replace(found, items=items)


def test_a_long_page_says_what_it_leaves_out(evaluated, tmp_path, pictures):
    found = many(compare([evaluated("base", 0), evaluated("tuned", 1)]), 3300, sorted(pictures.iterdir()))
    shown = write_page(found, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size <= PAGE_BYTES
    assert shown == len(page.cards) == SHOWN
    assert "it shows 2,000 of the 3,300 questions" in page.source
    assert all(f'"{kind}": {count}' in page.source for kind, count in found.counts(1).items())
    assert sum("Forgotten" in card for card in page.cards) == found.counts(1)["forgotten"]
    assert page.source.count("url(data:image/webp;base64,") == 5


def test_pictures_shrink_until_the_page_is_small(evaluated, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)  # noise is what compresses worst
    files = [tmp_path / f"{n}.png" for n in range(60)]
    for file in files:
        Image.fromarray(draw.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(file)
    found = many(compare([evaluated("base", 0), evaluated("tuned", 1)]), 60, files)
    widths = []
    for size in (1_000_000, 200_000):
        monkeypatch.setattr(compare_page, "PAGE_BYTES", size)
        write_page(found, tmp_path / "page.html")
        content = (tmp_path / "page.html").read_bytes()
        assert len(content) <= size
        uris = re.findall(rb"url\(data:image/webp;base64,([^)]+)\)", content)
        assert len(uris) == 60
        widths.append(Image.open(io.BytesIO(base64.b64decode(uris[0]))).width)
    assert widths[0] > widths[1] >= 48
    files[7].write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"7\.png: the file is not an image"):
        write_page(found, tmp_path / "page.html")


def break_results(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "results.json").read_text())
    change(content)
    (folder / "results.json").write_text(json.dumps(content))


def swap_answers(folder: Path) -> None:
    file = folder / "predictions" / "gqa.jsonl"
    file.write_text(file.read_text().replace('"no"', '"yes"'))


def drop_a_line(folder: Path) -> None:
    file = folder / "predictions" / "gqa.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def into_a_model(folder: Path) -> None:
    (folder / "results.json").unlink()
    (folder / "config.json").write_text("{}")


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "results.json").unlink(), "no results.json; compare takes folders that"),
    (into_a_model, "a model without results; run: llava-sculpt eval --model"),
    (lambda folder: (folder / "results.json").write_text("{"), "results.json: not valid JSON"),
    (lambda folder: break_results(folder, lambda c: c.pop("tasks")), "results.json: tasks: is missing"),
    (lambda folder: break_results(folder, lambda c: c["tasks"].clear()), "tasks: none was scored"),
    (
        lambda folder: break_results(folder, lambda c: c["settings"]["data"].pop("gqa")),
        "settings.data does not have it",
    ),
    (
        lambda folder: break_results(folder, lambda c: c["settings"]["data"].update(gqa="other")),
        "cannot stand together, scored differently: gqa (questions)",
    ),
    (
        lambda folder: break_results(folder, lambda c: c["tasks"]["okvqa"].update(variant="official")),
        "cannot stand together, scored differently: okvqa (scorer)",
    ),
    (
        lambda folder: (folder / "predictions" / "gqa.jsonl").unlink(),
        "gqa.jsonl: not found; run: llava-sculpt eval --model MODEL --tasks coco,okvqa,gqa --output_dir",
    ),
    (swap_answers, "gqa.jsonl: scores 75.00, where results.json says 50.00"),
    (drop_a_line, "gqa.jsonl: gqa: 1 questions without a prediction: 'gqa3'"),
]


@pytest.mark.parametrize(("damage", "expected"), BROKEN, ids=[expected for _, expected in BROKEN])
def test_what_cannot_be_compared_has_one_message(evaluated, tmp_path, capsys, damage, expected):
    folders = [evaluated("base", 0), evaluated("tuned", 1)]
    damage(folders[1])
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "page.html")]) == 2
    printed = capsys.readouterr()
    messages = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and expected in messages[0], messages
    assert printed.out == "" and not (tmp_path / "page.html").exists()


def test_what_is_asked_for_must_make_sense(evaluated, tmp_path, capsys):
    base, tuned = str(evaluated("base", 0)), str(evaluated("tuned", 1))
    for arguments, expected in (
        ([base], "needs two or more folders"),
        ([base, base], "needs two or more folders, all different"),
        ([base, str(tmp_path / "gone")], "gone: folder not found"),
        ([base, tuned, "--out", f"{base}/results.json"], "should be the name of an HTML file"),
        ([base, tuned, "--data_root", str(tmp_path / "gone")], "name their folder with --data_root"),
    ):
        assert main(["compare", *arguments]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "data" / "gqa" / "test_annotations.json").write_text(
        json.dumps({**GOLD["gqa"], "gqa0": {**GOLD["gqa"]["gqa0"], "answer": "no"}})
    )
    assert main(["compare", base, tuned]) == 2
    assert "data: other questions or answers of gqa" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_models_of_one_name_and_other_bases_are_told_apart(evaluated):
    base, tuned = evaluated("base", 0), evaluated("tuned", 1, model_id="base", base="other")
    found = compare([base, tuned])
    assert found.labels == [f"base ({base})", f"base ({tuned})"]
    assert "another base model" in found.notes[0]
