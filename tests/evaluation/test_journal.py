"""The journal: what was answered survives a kill, what is of another evaluation does not come in."""

from __future__ import annotations

import pytest

from llava_sculpt.evaluation.journal import Journal


def written(folder, answers, rank=0, key="k") -> Journal:
    journal = Journal(folder / "predictions", "gqa", key)
    journal.append(answers, rank)
    journal.close()
    return journal


def test_answers_of_all_processes_come_back(tmp_path):
    written(tmp_path, {"a": "x\u2028y", 2: ""}, rank=0)
    journal = written(tmp_path, {3: "\u00e9\n"}, rank=5)
    assert journal.read() == {"a": "x\u2028y", 2: "", 3: "\u00e9\n"}
    journal.remove()
    assert journal.read() == {}
    assert list((tmp_path / "predictions").iterdir()) == []


@pytest.mark.parametrize("keep", range(0, 100, 3))
def test_a_file_cut_anywhere_gives_its_whole_lines_and_goes_on(tmp_path, keep):
    journal = written(tmp_path, {1: "one", 2: "two"})
    (part,) = journal.parts()
    content = part.read_bytes()
    part.write_bytes(content[:keep])
    whole = content[:keep].count(b"\n")
    expected = {1: "one", 2: "two"} if whole == 3 else {1: "one"} if whole == 2 else {}
    assert journal.read() == expected
    written(tmp_path, {3: "three"})
    assert journal.read() == {**expected, 3: "three"}
    assert part.read_bytes().count(b'{"key"') == 1


def test_another_evaluation_is_not_continued_and_said_so(tmp_path, capsys):
    old = written(tmp_path, {1: "one"}, key="old")
    new = Journal(old.folder, "gqa", "new")
    assert new.read() == {}
    assert "gqa.part0.jsonl: not continued: of another model" in capsys.readouterr().err
    assert new.parts() == []


def test_a_damaged_file_is_not_continued(tmp_path, capsys):
    journal = written(tmp_path, {1: "one", 2: "two"})
    (part,) = journal.parts()
    part.write_bytes(part.read_bytes().replace(b'"text": "one"', b'"text": one'))
    assert journal.read() == {}
    assert "not continued" in capsys.readouterr().err


def test_a_flipped_bit_in_an_answer_is_noticed(tmp_path, capsys):
    journal = written(tmp_path, {1: "one", 2: "two"})
    (part,) = journal.parts()
    part.write_bytes(part.read_bytes().replace(b'"two"', b'"twn"'))
    assert journal.read() == {}
    assert "an answer is damaged" in capsys.readouterr().err


def test_other_tasks_are_left_alone(tmp_path):
    journal = written(tmp_path, {1: "one"})
    Journal(journal.folder, "okvqa", "k").remove()
    assert journal.read() == {1: "one"}
