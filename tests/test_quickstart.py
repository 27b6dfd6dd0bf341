"""The quick start as a newcomer has it: text that looks like Python, in a few minutes, twice."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def first(modalities, tmp_path_factory: pytest.TempPathFactory):
    """The finished first run and its folder."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    # All cores, as a user would have it.
    return modalities("quickstart", "--folder", folder, timeout=800, threads=None), folder


def test_it_trains_and_writes_python(first) -> None:
    done, folder = first
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["loss"] for record in records if record["event"] == "evaluated"]
    assert held_out[0] - held_out[-1] >= 3.0
    for loss in (held_out[0], held_out[-1]):
        assert f"{loss:.4f}" in done.stdout, "the held-out loss is printed before and after"
    text = done.stdout[done.stdout.index("3/3") :]
    assert re.search(r"^ {4}\S", text, re.MULTILINE), "indented lines"
    assert "def " in text
    assert "self" in text


def test_a_second_call_says_what_it_found(first, modalities) -> None:
    done, folder = first
    again = modalities("quickstart", "--folder", folder, timeout=300)
    assert again.returncode == 0, again.stderr
    # Nothing is packed or trained again, and the same weights write the same text.
    assert "million tokens" not in again.stdout
    assert again.stdout[again.stdout.index("3/3") :] == done.stdout[done.stdout.index("3/3") :]


def test_generate_continues_a_prompt(first, modalities) -> None:
    _, folder = first
    options = ["--prompt", "class Reader:\n    def ", "--max-new-tokens", "16", "--temperature", "0"]
    one = modalities("generate", folder, *options)
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("class Reader:\n    def ")
    assert len(one.stdout) > len("class Reader:\n    def \n")
    assert modalities("generate", folder, *options).stdout == one.stdout
