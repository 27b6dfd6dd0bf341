"""The bench of checkpoints end to end on a tiny model: both ways are measured, and what it says is what it measured."""

from __future__ import annotations

import json
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benches read /proc")


@pytest.fixture
def stall(root, monkeypatch):
    before = set(sys.modules)
    for folder in ("tools/bench", "tools/bench/training"):
        monkeypatch.syspath_prepend(str(root / folder))
    import checkpoint_stall

    monkeypatch.setattr(sys, "argv", [str(root / "tools/bench/training/checkpoint_stall.py")])
    yield checkpoint_stall
    for name in set(sys.modules) - before:
        if str(root / "tools") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_both_ways_are_measured(stall, tmp_path, capsys):
    words = ["--hidden-size", "16", "--layers", "1", "--sequence-length", "8", "--every", "2", "--saves", "2"]
    words += ["--rounds", "1", "--folder", str(tmp_path), "--save", str(tmp_path / "result")]
    result = stall.main(words)
    assert json.loads((tmp_path / "result.json").read_text())["ratios"] == result["ratios"]
    waited, behind = (result["rounds"][way][0] for way in stall.WAYS)
    assert waited["blocked_seconds"] == waited["save_seconds"] > 0
    assert 0 < behind["blocked_seconds"] < behind["save_seconds"]
    assert waited["bytes"] == behind["bytes"] > 3 * 4 * 2 * 16 * stall.VOCABULARY
    assert result["ratios"] == [behind["blocked_seconds"] / waited["blocked_seconds"]]
    assert f"median {result['ratios'][0]:.1%}" in capsys.readouterr().out
