"""Every event is a line of valid JSON; repeated steps stand in the file once."""

import json
import math

import pytest

from modalities_core.events import (
    CheckpointSaved,
    Evaluated,
    Generated,
    Profiled,
    RunEnded,
    RunStarted,
    StepLogged,
    Warned,
)
from modalities_core.interfaces import Sink
from modalities_core.sinks.jsonl import JsonLines


def started(folder, first_step=0):
    return RunStarted(folder, first_step, 10, 100, 1000, 1, "cpu")


def logged(step, loss=1.0):
    return StepLogged(step, 10, loss, 0.5, 1e-3, step * 100, step, 50.0, None, 0, {"step": 0.1})


def evaluated(step):
    return Evaluated(step, "held-out", math.inf, math.inf, 100, 0.1)


def lines(path):
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().split("\n")[:-1]]


def test_every_event_is_a_line(tmp_path):
    sink = JsonLines()
    assert isinstance(sink, Sink)
    events = [
        started(tmp_path / "run"),
        logged(1, math.nan),
        evaluated(1),
        CheckpointSaved(1, tmp_path, 10, 0.1),
        Warned("a\nb\u2028c"),
        Generated(1, "def ", "f():\n    pass"),
        Profiled(1, tmp_path, "a table"),
        RunEnded(1, "done"),
    ]
    for count, event in enumerate(events, 1):
        sink.consume(event)
        assert len(lines(tmp_path / "run" / "metrics.jsonl")) == count
    sink.close()
    found = lines(tmp_path / "run" / "metrics.jsonl")
    names = [
        "run_started",
        "step_logged",
        "evaluated",
        "checkpoint_saved",
        "warned",
        "generated",
        "profiled",
        "run_ended",
    ]
    assert [line["event"] for line in found] == names
    assert (found[1]["loss"], found[2]["perplexity"], found[1]["mfu"]) == ("nan", "inf", None)
    assert found[1]["seconds"] == {"step": 0.1}
    assert found[3]["folder"] == str(tmp_path)
    assert found[4]["message"] == "a\nb\u2028c"
    assert all(line["time"] > 1.6e9 for line in found)


def test_no_file_before_the_run_starts_and_earlier_events_follow_it(tmp_path):
    sink = JsonLines("logs/m.jsonl")
    sink.consume(Warned("early"))
    assert list(tmp_path.iterdir()) == []
    sink.consume(started(tmp_path))
    sink.close()
    assert [line["event"] for line in lines(tmp_path / "logs" / "m.jsonl")] == ["warned", "run_started"]


@pytest.mark.parametrize("first_step", [0, 2, 3])
def test_repeated_steps_stand_once_and_nothing_is_lost(tmp_path, first_step):
    sink = JsonLines()
    sink.consume(started(tmp_path))
    sink.consume(Warned("line\u2028separator"))
    for step in range(1, 5):
        sink.consume(logged(step))
        sink.consume(CheckpointSaved(step, tmp_path, 10, 0.1))
        sink.consume(evaluated(step))
        sink.consume(Generated(step, "p", "t"))
    sink.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "step_lo')
    before = (tmp_path / "metrics.jsonl").read_text().split("\n")
    sink = JsonLines()
    sink.consume(started(tmp_path, first_step))
    for step in range(first_step + 1, 5):
        sink.consume(logged(step, 2.0))
    sink.close()
    found = lines(tmp_path / "metrics.jsonl")
    logs = [(line["step"], line["loss"]) for line in found if line["event"] == "step_logged"]
    assert logs == [(step, 1.0 if step <= first_step else 2.0) for step in range(1, 5)]
    assert [line["step"] for line in found if line["event"] == "evaluated"] == list(range(1, first_step))
    assert [line["step"] for line in found if line["event"] == "generated"] == list(range(1, first_step + 1))
    saved = [line["step"] for line in found if line["event"] == "checkpoint_saved"]
    assert saved == list(range(1, first_step + 1))
    kept = (tmp_path / "metrics.jsonl").read_text().split("\n")
    moved = (tmp_path / "metrics.abandoned.jsonl").read_text().split("\n")
    assert set(before) <= set(kept) | set(moved)


def test_absolute_path(tmp_path):
    sink = JsonLines(tmp_path / "elsewhere.jsonl")
    sink.consume(started(tmp_path / "run"))
    sink.close()
    assert len(lines(tmp_path / "elsewhere.jsonl")) == 1
