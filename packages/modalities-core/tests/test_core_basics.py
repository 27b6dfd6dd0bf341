"""Progress arithmetic and files that appear whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities_core import progress
from modalities_core.errors import ConfigError
from modalities_core.files import checksum, replacing, write_json

small = st.integers(1, 64)


@given(small, small, small)
def test_accumulation_inverts_samples_per_step(micro_batch: int, accumulation: int, ranks: int) -> None:
    total = progress.samples_per_step(micro_batch, accumulation, ranks)
    assert progress.accumulation(total, micro_batch, ranks) == accumulation


def test_a_batch_that_cannot_be_split_shows_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"4 x 3 = 12 does not divide it") as caught:
        progress.accumulation(32, 4, 3)
    assert "24 and 36" in str(caught.value)


@given(st.integers(0, 10**6), small, small)
def test_steps_and_tokens_are_inverse(steps: int, samples: int, length: int) -> None:
    tokens = progress.tokens_for_steps(steps, samples, length)
    assert progress.steps_for_tokens(tokens, samples, length) == steps
    assert progress.samples_for_tokens(tokens, length) == steps * samples


def test_epochs() -> None:
    assert progress.epochs(150, 100) == 1.5
    assert progress.steps_for_epochs(1.5, 100, 30) == 5


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"n": 1})
    with pytest.raises(RuntimeError), replacing(file) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"n": 1}

    def refuse(*_: object) -> None:
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no rename"):
        write_json(file, {"n": 2})
    assert json.loads(file.read_text()) == {"n": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_checksum_is_xxh3_of_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"")
    # The published XXH3-64 of no input with seed 0.
    assert checksum(file) == "2d06800538d394c2"
