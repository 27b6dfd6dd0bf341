"""What a user sees of a run."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console as RichConsole
from sink_parts import Kept

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
from modalities_core.sinks import console
from modalities_core.sinks.console import Console, line
from modalities_core.sinks.fanout import Fanout

EVENTS = [
    RunStarted(Path("run"), 5, 100, 4096, 1234567, 2, "cpu", "run/checkpoints/step-00000005"),
    StepLogged(10, 100, 3.14159, 0.25, 6e-4, 40960, 80, 12345.6, 0.432, 0, {"step": 41.0}),
    Evaluated(10, "held-out [x]", 2.5, 12.18, 4096, 1.25, 0.9),
    CheckpointSaved(10, Path("run/checkpoints/step-00000010"), 12_300_000, 0.5, 0.5),
    CheckpointSaved(20, Path("run/checkpoints/step-00000020"), 12_300_000, 3.5, 0.25),
    Generated(10, "def ", "f(x):\n\n    [x]\x1b"),
    Profiled(10, Path("run/profile"), "a\nb"),
    Warned("mind the [gap]"),
    RunEnded(10, "preempted", "asked to stop"),
]


def show(monkeypatch, terminal, events=EVENTS):
    stream = io.StringIO()
    opened = RichConsole(file=stream, force_terminal=terminal, width=160, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "open_console", lambda: opened)
    sink = Console()
    assert isinstance(sink, Sink)
    for event in events:
        sink.consume(event)
    sink.close()
    return stream.getvalue()


def test_plain_lines(monkeypatch):
    assert show(monkeypatch, terminal=False).splitlines() == [
        "training from step 5 (run/checkpoints/step-00000005) to step 100: 1,234,567 parameters, "
        "4,096 tokens per step, 2 ranks on cpu; folder run",
        "step 10/100  loss 3.1416  gradient norm 0.25  lr 0.0006  12,346 tokens/s  MFU 43.2%  1:01:30 left",
        "step 10  held-out [x]: loss 2.5000  perplexity 12.18  bits per byte 0.9000  (4,096 tokens, 1.2 s)",
        "step 10  saved run/checkpoints/step-00000010 (12.3 MB, 0.5 s)",
        "step 20  saved run/checkpoints/step-00000020 (12.3 MB, 3.5 s, training waited 0.25 s)",
        "step 10  sample:",
        "    def f(x):",
        "    ",
        "        [x]\ufffd",
        "step 10  profiled, traces in run/profile",
        "    a",
        "    b",
        "warning: mind the [gap]",
        "preempted at step 10: asked to stop",
    ]


def test_bar_on_a_terminal(monkeypatch):
    shown = show(monkeypatch, terminal=True)
    assert "\x1b[" in shown
    assert "10/100" in shown
    assert "12,346 tokens/s" in shown
    for text in ("held-out [x]: loss 2.5000", "saved run/checkpoints", "mind the [gap]", "preempted at step 10"):
        assert text in shown


def test_events_without_a_start(monkeypatch):
    shown = show(monkeypatch, False, [Warned("early"), RunEnded(0, "failed", "no data")])
    assert shown.splitlines() == ["warning: early", "failed at step 0: no data"]


def test_unknown_values_are_left_out(monkeypatch):
    event = StepLogged(10, 10, 3.0, 0.25, 6e-4, 1, 1, 0.0)
    assert "MFU" not in show(monkeypatch, False, [event])
    assert "left" not in show(monkeypatch, False, [event])


def test_fanout_warns_once_per_sink_and_never_raises():
    class Broken:
        def consume(self, event):
            raise OSError("full")

        def close(self):
            raise OSError("still")

    kept = Kept()
    fanout = Fanout([Broken(), kept, Broken()])
    for event in EVENTS:
        fanout.consume(event)
    fanout.close()
    assert kept.closed
    assert [event for event in kept.events if event in EVENTS] == EVENTS
    assert len(kept.events) == len(EVENTS) + 2

    class Interrupting(Kept):
        def consume(self, event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Fanout([Interrupting()]).consume(EVENTS[0])


def test_sinks_load_no_torch():
    code = "import sys, modalities_core.sinks.console, modalities_core.sinks.jsonl, modalities_core.sinks.fanout; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_line_of_a_step_tells_what_is_measured_and_fits():
    plain = StepLogged(90_000, 100_000, 3.14159, 0.25, 6e-4, 1, 1, 12_345.6, 0.432, seconds={"step": 0.5})
    measured = replace(plain, peak_measured=True)
    assert "MFU 43.2%  1:23:20 left" in line(plain)
    assert "MFU 43.2% (measured)  1:23:20 left" in line(measured)
    assert len(line(measured)) <= 120
    more = line(replace(plain, noise_scale=123_456.7, skipped_steps=2))
    assert "noise scale 123,457 tokens  2 skipped" in more
