"""The streaming reader gives what `json` gives, wherever the window of text ends, and refuses what `json` refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_sculpt.errors import UserError
from llava_sculpt.tasks import stream

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))
contents = st.dictionaries(st.text(max_size=4), values, min_size=1, max_size=5)
same_folder = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@same_folder
@given(contents, st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_records_are_those_of_json(
    tmp_path: Path, content: dict[str, Any], window: int, indent: int | None, ascii: bool
):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_CHUNK", window)
        assert dict(stream.stream_records(file)) == content
        records = list(content.values())
        file.write_text(
            json.dumps({"before": content, "images": records}, indent=indent, ensure_ascii=ascii), encoding="utf-8"
        )
        assert list(stream.stream_records(file, "images")) == [(str(i), record) for i, record in enumerate(records)]


@same_folder
@given(contents, st.integers(1, 9), st.integers(0, 10**6), st.sampled_from('{}[]",:x1 \\'))
def test_damage_is_found_if_json_finds_it(tmp_path: Path, content: dict[str, Any], window: int, at: int, sign: str):
    text = json.dumps(content)
    at %= len(text)
    text = text[:at] + sign + text[at + 1 :]
    file = tmp_path / "x.json"
    file.write_text(text)
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_CHUNK", window)
        if isinstance(expected, dict) and expected:
            assert dict(stream.stream_records(file)) == expected
        else:
            with pytest.raises(UserError):
                list(stream.stream_records(file))


def test_the_place_of_an_error_counts_from_the_beginning_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "_CHUNK", 5)
    file = tmp_path / "x.json"
    file.write_text('{\n "a": [1, 2],\n "b": [1, oops]\n}')
    with pytest.raises(UserError, match=r"line 3, column 11: Expecting value"):
        list(stream.stream_records(file))
