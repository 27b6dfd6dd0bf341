"""JSONL reading against the json module, and against every kind of damaged line."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, DataError
from modalities_data import jsonl
from modalities_data.jsonl import ByteRange, blocks, byte_ranges, documents, failure_error, line_number

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=12)


def whole(path):
    return ByteRange(path, 0, path.stat().st_size)


@settings(max_examples=60, deadline=None)
@given(
    texts=TEXTS,
    ends=st.sampled_from(["\n", "\r\n", "\n\n", "\n  \n"]),
    last=st.booleans(),
    target=st.integers(1, 90),
    block=st.integers(1, 50),
    ascii_only=st.booleans(),
)
def test_any_cut_gives_the_documents_that_json_gives(
    tmp_path_factory, texts, ends, last, target, block, ascii_only
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    lines = [json.dumps({"id": 1, "text": text, "more": [text]}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes((ends.join(lines) + (ends if last else "")).encode())
    ranges = byte_ranges(path, target)
    assert [ranges[0].start, ranges[-1].end] == [0, path.stat().st_size]
    assert all(a.end == b.start for a, b in pairwise(ranges))
    assert all(part.end - part.start >= target for part in ranges[:-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK_BYTES", block)
        found = [part for lines in ranges for part in blocks(lines)]
    assert [text for part in found for text in part.texts] == texts
    assert sum(part.bytes for part in found) == path.stat().st_size
    assert not any(part.failures for part in found)
    blank = sum(not line.strip() for line in path.read_bytes().decode().split("\n")[: -1 if last else None])
    assert sum(part.blank_lines for part in found) == blank


BAD = {
    "malformed": (b'{"text": "a"', "malformed"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "malformed"),
    "missing key": (b'{"body": "a"}', "missing required field `text`"),
    "wrong type": (b'{"text": 3}', "Expected `str`, got `int`"),
    "null": (b'{"text": null}', "Expected `str`, got `null`"),
    "no object": (b'["a"]', "Expected `object`, got `array`"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "lone surrogate": (b'{"text": "\\ud800 abcdefgh"}', "malformed"),
    "NUL": (b"\x00\x00", "malformed"),
    "deep": (b'{"text": "a", "x": ' + b"[" * 20000 + b"]" * 20000 + b"}", "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, name) -> None:
    line, reason = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\r\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(DataError, match="bad.jsonl:4: .*") as caught:
        list(documents(path))
    assert reason in caught.value.message
    (block,) = blocks(whole(path))
    assert block.texts == ["one", "two", "three"]
    assert [failure.offset for failure in block.failures] == [34]
    assert block.blank_lines == 1


def test_byte_order_mark_is_no_error_but_only_at_the_start(tmp_path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    (block,) = blocks(whole(path))
    assert block.texts == ["a"]
    assert "bom.jsonl:2:" in str(failure_error(path, block.failures[0]))


def test_another_key(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"der Inhält": "a", "text": 1}\n')
    assert list(documents(path, "der Inhält")) == ["a"]
    with pytest.raises(ConfigError, match="a key with quotes"):
        list(documents(path, 'the "text"'))


def test_line_numbers_count_on(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a\nbb\n\nccc\n")
    assert [line_number(path, offset) for offset in (0, 2, 5, 6)] == [1, 2, 3, 4]
    assert line_number(path, 6, start=2) == 3


def test_missing_empty_and_shrinking_files(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        byte_ranges(tmp_path / "none.jsonl", 10)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match="is empty"):
        byte_ranges(empty, 10)
    empty.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"shrank while it was read: 99 bytes expected, 14 found"):
        list(blocks(ByteRange(empty, 0, 99)))
    with pytest.raises(DataError, match="Is a directory"):
        byte_ranges(tmp_path, 10)


def test_a_line_without_end_is_refused_before_memory_runs_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(jsonl, "LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b" " * 5000)
    with pytest.raises(DataError, match=r"x\.jsonl:2: a line is longer than 1000 bytes"):
        list(blocks(whole(path)))
