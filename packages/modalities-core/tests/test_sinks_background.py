"""A sink on a thread: in order, never in the way, one warning, nothing lost without a word."""

import logging
import threading
import time
from pathlib import Path

import pytest
from sink_parts import Kept

from modalities_core.errors import ConfigError
from modalities_core.events import CheckpointSaved, Evaluated, RunEnded, RunStarted, StepLogged, Warned
from modalities_core.interfaces import Sink
from modalities_core.sinks import background
from modalities_core.sinks.background import Background, Degraded
from modalities_core.sinks.fanout import Fanout
from modalities_core.sinks.measures import measures
from modalities_core.sinks.settings import flat, settings

STARTED = RunStarted(Path("run"), 0, 10, 100, 1000, 1, "cpu")
STEPS = [StepLogged(step, 10, 1.0, 0.5, 1e-3, step, step, 1.0) for step in range(1, 9)]
EVENTS = [STARTED, *STEPS, RunEnded(8, "done")]


class Failing(Kept):
    """Raises ``error`` for the first ``times`` calls."""

    def __init__(self, error, times):
        super().__init__()
        self.error, self.times = error, times

    def consume(self, event):
        if self.times:
            self.times -= 1
            raise self.error
        super().consume(event)


class Stuck(Kept):
    def __init__(self):
        super().__init__()
        self.free = threading.Event()

    def consume(self, event):
        self.free.wait(30)
        super().consume(event)


def run(sink, events=EVENTS):
    """What the other sinks of a run see of warnings when ``sink`` gets ``events``."""
    others = Kept()
    fanout = Fanout([sink, others])
    for event in events:
        fanout.consume(event)
        time.sleep(0.02)
    fanout.close()
    return [event.message for event in others.events if isinstance(event, Warned)]


def test_events_arrive_in_order_on_another_thread():
    threads = set()

    class Watching(Kept):
        def consume(self, event):
            threads.add(threading.current_thread())
            super().consume(event)

    inner = Watching()
    sink = Background(inner, "x")
    assert isinstance(sink, Sink)
    assert run(sink) == []
    assert inner.events == EVENTS
    assert inner.closed
    assert len(threads) == 1
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("error", [OSError("network is down"), ValueError("a\nb")])
def test_a_failure_that_passes_costs_one_warning_and_no_event(error):
    inner = Failing(error, 3)
    said = run(Background(inner, "x", pause=0.001))
    assert said == [f"the sink x failed and the run goes on: {type(error).__name__}: {str(error).splitlines()[0]}"]
    assert [event for event in inner.events if not isinstance(event, Warned)] == EVENTS


def test_a_failure_that_stays_costs_one_warning_and_the_losses_are_counted(monkeypatch, caplog):
    monkeypatch.setattr(background, "TRIES", 2)
    inner = Failing(OSError("full"), 1000)
    with caplog.at_level(logging.INFO, "modalities"):
        said = run(Background(inner, "x", pause=0.001))
    assert said == ["the sink x failed and the run goes on: OSError: full"]
    # The warning itself is an event as well.
    assert "x: 11 of 11 events are not recorded there" in caplog.text
    assert inner.closed


def test_what_no_repetition_can_mend_is_left_out_at_once():
    inner = Failing(ConfigError("no credentials"), 1)
    assert run(Background(inner, "x")) == ["the sink x is left out and the run goes on: no credentials"]
    assert inner.events == []


def test_a_remark_is_a_warning_but_no_loss():
    inner = Failing(Degraded("recording offline"), 1)
    assert run(Background(inner, "x")) == ["recording offline"]
    assert len(inner.events) == len(EVENTS)


def test_a_sink_that_hangs_neither_holds_training_nor_its_end(monkeypatch):
    monkeypatch.setattr(background, "CAPACITY", 5)
    inner = Stuck()
    sink = Background(inner, "x", patience=0.2)
    start = time.perf_counter()
    said = run(sink)
    assert time.perf_counter() - start < 5
    assert said == ["the sink x is too slow, so it leaves events out and the run goes on"]
    inner.free.set()


def test_trouble_at_the_very_end_is_told_and_counted():
    inner = Stuck()
    said = run(Background(inner, "x", patience=0.2))
    assert said == ["the sink x did not end within 0.2 s; 10 of 10 events are not recorded there"]
    inner.free.set()


def test_warnings_of_the_end_reach_sinks_that_come_first():
    class Late(Kept):
        def close(self):
            raise OSError("no room for the last block")

    first, late = Kept(), Background(Late(), "x")
    fanout = Fanout([first, late])
    fanout.consume(STARTED)
    fanout.close()
    assert "no room" in first.events[-1].message
    assert first.closed


def test_names_of_measures():
    step = StepLogged(3, 10, 1.5, 0.5, 1e-3, 300, 3, 50.0, 0.4, 7, {"step": 0.1, "data": 0.01}, 25.0)
    assert measures(step) == {
        "train/loss": 1.5,
        "train/gradient_norm": 0.5,
        "train/learning_rate": 1e-3,
        "train/skipped_steps": 0.0,
        "data/tokens": 300.0,
        "data/samples": 3.0,
        "speed/tokens_per_second": 50.0,
        "speed/tokens_per_second_per_device": 25.0,
        "speed/mfu": 0.4,
        "memory/used": 7.0,
        "seconds/step": 0.1,
        "seconds/data": 0.01,
    }
    assert measures(Evaluated(3, "code", 1.0, 2.7, 10, 0.5)) == {
        "held_out/code/loss": 1.0,
        "held_out/code/perplexity": 2.7,
        "held_out/code/seconds": 0.5,
    }
    seconds = {"checkpoint/seconds": 0.5, "checkpoint/blocked_seconds": 0.25}
    assert measures(CheckpointSaved(3, Path("x"), 10, 0.5, 0.25)) == {"checkpoint/bytes": 10, **seconds}
    assert measures(Warned("x")) == {}


def test_configurations_leave_without_secrets(tmp_path):
    (tmp_path / "config.resolved.yaml").write_text(
        "version: 1\n"
        "tokenizer: {component: t, path: tokenizer.json}\n"
        "model: {experts_per_token: 2, key: s3cret, end_of_text_token: ''}\n"
        "sinks:\n"
        "- {api_key: s3cret, auth_token: '${env:TOKEN}', uri: 'https://me:s3cret@host/x', password: [s3cret]}\n"
        "steps: 10\n"
    )
    found = settings(tmp_path)
    assert "s3cret" not in str(found)
    assert found["model"]["experts_per_token"] == 2
    assert found["sinks"][0]["auth_token"] == "${env:TOKEN}"
    assert found["sinks"][0]["uri"] == "https://***@host/x"
    assert flat(found)["sinks.0.uri"] == "https://***@host/x"
    assert flat(found)["tokenizer.path"] == "tokenizer.json"
    assert settings(tmp_path / "nowhere") == {}
