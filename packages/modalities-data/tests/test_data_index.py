"""The line index against splitting the file in Python."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modalities_core.errors import DataError
from modalities_data.prepare import index as index_module
from modalities_data.prepare.index import index_lines, open_lines

PARTS = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b" \t\r\n", b"  ", b'{"text": "a"}', b" [1]", b"\x0b", b"\n\n", b"x" * 40, b"\x85"]
    ),
    max_size=30,
)


def expected(content: bytes) -> tuple[list[int], int]:
    """Starts of lines that are not blank, and how many are."""
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    starts, blank = [], 0
    lines = content[start:].split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for line in lines:
        if line.strip():
            starts.append(start)
        else:
            blank += 1
        start += len(line) + 1
    return starts, blank


@settings(max_examples=150, deadline=None)
@given(parts=PARTS, mark=st.booleans(), chunk=st.integers(3, 60), few=st.sampled_from([0, 3, 1000]))
@example(parts=[b" " * 50, b"\n", b"x"], mark=True, chunk=3, few=0)
def test_any_lines_in_any_chunks(tmp_path_factory, parts, mark, chunk, few) -> None:
    path = tmp_path_factory.mktemp("index") / "x.jsonl"
    content = (b"\xef\xbb\xbf" if mark else b"") + b"".join(parts)
    path.write_bytes(content)
    starts, blank = expected(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "CHUNK", chunk)
        patch.setattr(index_module, "FEW_NEWLINES", few)
        if not starts:
            with pytest.raises(DataError, match="no documents"):
                index_lines(path)
            assert not path.with_name("x.jsonl.lines").exists()
            return
        made = index_lines(path)
    assert np.fromfile(path.with_name("x.jsonl.lines"), "<u8").tolist() == starts
    assert (made.lines, made.blank_lines, made.bytes) == (len(starts), blank, len(content))
    assert made.checksum == xxhash.xxh3_64_hexdigest(content)
    opened = open_lines(path)
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert [opened.line(number) for number in range(len(starts))] == [line.removesuffix(b"\r") for line in lines]


@pytest.mark.parametrize("length", [100, 6000])
def test_long_and_short_lines(tmp_path, length) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "x" * (length + number % 7)}).encode() for number in range(3_000_000 // length)]
    path.write_bytes(b"\n".join(lines))
    made = index_lines(path)
    opened = open_lines(path)
    assert made.lines == len(lines) and opened.line(made.lines - 1) == lines[-1]
    assert np.array_equal(opened.starts, np.cumsum([0, *(len(line) + 1 for line in lines[:-1])]))
    with pytest.raises(IndexError):
        opened.line(made.lines)


def test_validation_names_the_line(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n{"txt": 1}\n')
    assert index_lines(path).lines == 2
    with pytest.raises(DataError, match=r"x\.jsonl:3: .*missing required field"):
        index_lines(path, tmp_path / "other", validate=True)
    assert not (tmp_path / "other").exists()


def test_an_index_that_does_not_fit_is_refused(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="No such file"):
        open_lines(path)
    index_lines(path)
    index = path.with_name("x.jsonl.lines")
    manifest = path.with_name("x.jsonl.lines.json")
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl: .* expects 28 bytes, the file has 14\n.*index it again"):
        open_lines(path)
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    good = index.read_bytes()
    for content, message in (
        (good[:9], "has 9"),
        (good[8:] + good[:8], "do not rise"),
        (good[:8] + b"\xff" * 8, "lie"),
    ):
        index.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_lines(path)
    index.write_bytes(good)
    kept = manifest.read_text()
    for content, message in (
        (kept[:20], "damaged"),
        (kept.replace('version": 1', 'version": 2'), "expected modalities"),
    ):
        manifest.write_text(content)
        with pytest.raises(DataError, match=message):
            open_lines(path)


def test_the_command(command, tmp_path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    done = command("index", tmp_path / "x.jsonl", "--validate", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["lines"], summary["blank_lines"], summary["validated"]) == (2, 1, True)
    assert np.fromfile(tmp_path / "x.jsonl.lines", "<u8").tolist() == [3, 20]
    again = command("index", tmp_path / "x.jsonl")
    assert again.returncode == 3 and "exists already" in again.stderr
    assert command("index", tmp_path / "x.jsonl", "--overwrite", "--out", tmp_path / "y").returncode == 0
