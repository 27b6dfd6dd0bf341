"""The bench of generation: both libraries write the same text, and the report says who was faster."""

from __future__ import annotations

import importlib
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benches read /proc")
pytest.importorskip("transformers")


@pytest.fixture
def generation(root, monkeypatch):
    """tools/bench/generation.py, imported as its own script does, and forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(root / "tools/bench"))
    yield importlib.import_module("generation")
    for name in set(sys.modules) - before:
        if str(root / "tools") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("batch", [1, 3])
def test_both_libraries_write_the_same_text_and_are_timed(generation, monkeypatch, batch):
    tiny = {"vocab_size": 97, "hidden_size": 32, "layers": 2, "heads": 4, "key_value_heads": 2}
    monkeypatch.setitem(generation.SHAPES, "2M", tiny)
    options = generation.arguments(["--rounds", "2", "--prompt-tokens", "5", "--new-tokens", "6"])
    row = generation.measure("2M", "float32", batch, options)
    assert row["same_tokens"] == 1.0
    assert all(len(found) == 2 and min(found) > 0 for found in row["all_ratios"].values())


def test_a_ratio_is_their_time_over_ours(generation):
    rounds = {
        generation.OURS: [{"first": 1.0, "decode": 2.0}] * 3,
        generation.THEIRS: [{"first": 1.0, "decode": 3.0}] * 3,
    }
    row = {
        "shape": "2M", "dtype": "float32", "batch": 8, "same_tokens": 1.0, "rounds": rounds,
        "tokens_per_cpu_second": {generation.OURS: 252.0, generation.THEIRS: 168.0},
        "ratios": {"first": 1.0, "decode": 1.5, "decode_wall": 1.25}, "all_ratios": {"decode": [1.25, 1.5, 1.75]},
    }  # fmt: skip
    text = generation.report({
        "rows": [row], "new_tokens": 64, "prompt_tokens": 128, "threads": 1, "rounds": 3, "command": "c",
        "commit": "c", "date": "d", "cpu": "c", "cores": 2, "load": 1.0, "versions": {},
    })  # fmt: skip
    assert "| 2M float32 | 8 | 252 | 168 | 1.50x | 1.25 to 1.75 | 1.25x | 1.00x | 100.0% |" in text
