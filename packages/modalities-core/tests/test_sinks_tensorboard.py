"""What TensorBoard reads back, and a disk that comes and goes."""

from __future__ import annotations

import pytest
from sink_parts import events, record

pytest.importorskip("tensorboard")


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_reads_what_was_written_and_a_resumed_run_replaces_repeated_steps(tmp_path, monkeypatch):
    from modalities_core.sinks import tensorboard

    times = iter(range(10**9, 10**9 + 10_000))
    monkeypatch.setattr(tensorboard.time, "time", lambda: next(times))
    record(tensorboard.tensorboard(), events(tmp_path / "run", 0, 6))
    record(tensorboard.tensorboard(), events(tmp_path / "run", 4, 8))
    found = accumulated(tmp_path / "run" / "tensorboard")
    losses = [(scalar.step, scalar.value) for scalar in found.Scalars("train/loss")]
    assert losses == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 9), (6, 10), (7, 11), (8, 12)]
    assert found.Scalars("data/tokens")[-1].value == 800
    assert found.Scalars("held_out/code (x)/perplexity")[-1].value == 3.5
    assert b"f():\n    <pass>" in found.Tensors("samples/'def '")[-1].tensor_proto.string_val[0]
    config = found.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert "hidden_size: 8" in config
    assert "s3cret" not in config


def test_tensorboard_goes_on_in_a_new_file_when_the_disk_is_back(tmp_path):
    from modalities_core.sinks.tensorboard import EventFile

    path = tmp_path / "logs"
    path.write_text("a file is in the way")
    sink = EventFile(path)
    first, *others = events(tmp_path / "run")
    with pytest.raises(OSError):
        sink.consume(first)
    with pytest.raises(OSError):
        sink.consume(others[0])
    path.unlink()
    for event in others:
        sink.consume(event)
    sink.close()
    assert [scalar.step for scalar in accumulated(path).Scalars("train/loss")] == [1, 2, 3]


def test_a_run_that_goes_back_replaces_what_it_repeats(tmp_path, monkeypatch):
    from modalities_core.sinks import tensorboard

    times = iter(range(10**9, 10**9 + 10_000))
    monkeypatch.setattr(tensorboard.time, "time", lambda: next(times))
    happened = events(tmp_path / "run", 0, 6)[:-1] + events(tmp_path / "run", 2, 6)
    record(tensorboard.tensorboard(), happened)
    found = accumulated(tmp_path / "run" / "tensorboard")
    assert [(scalar.step, scalar.value) for scalar in found.Scalars("train/loss")] == [
        (1, 1), (2, 2), (3, 5), (4, 6), (5, 7), (6, 8),
    ]  # fmt: skip
