"""Seconds by part of a step, on the host and by the events of a device."""

import time
from collections import deque

import pytest
import torch

from modalities_core.training.throughput import Phases


def test_parts_add_up_and_start_anew():
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        with phases.timed("forward"):
            time.sleep(0.01)
    with pytest.raises(KeyError), phases.timed("backward"):
        time.sleep(0.005)
        raise KeyError
    seconds = phases.seconds()
    assert set(seconds) == {"forward", "backward"}
    assert 0.02 <= seconds["forward"] < 0.2
    assert 0.005 <= seconds["backward"] < 0.1
    assert phases.seconds() == {}


class Device:
    """A queue of events that a device reaches ``behind`` recordings later; its clock ticks once a recording."""

    def __init__(self, behind):
        self.behind, self.ticks, self.made, self.waited = behind, 0, 0, 0

    def event(self, enable_timing):
        assert enable_timing
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self, stream):
        self.device.ticks += 1
        self.place = self.device.ticks

    def query(self):
        return self.place <= self.device.ticks - self.device.behind

    def synchronize(self):
        self.device.behind = 0
        self.device.waited += 1

    def elapsed_time(self, last):
        assert self.query() and last.query(), "reading an event that has not happened is an error of CUDA"
        return float(last.place - self.place)


@pytest.mark.parametrize("behind", [0, 7])
def test_events_are_read_when_they_have_happened_and_used_again(monkeypatch, behind):
    device = Device(behind)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    phases = Phases(torch.device("cuda"))
    order = deque()
    for _ in range(100):
        with phases.timed("forward"), phases.timed("nothing"):
            pass
        with phases.timed("backward"):
            order.append("b")
    assert device.waited == 0
    assert device.made <= behind + 6
    # One tick a recording: forward spans two recordings of the part inside it and its own last.
    assert phases.seconds() == pytest.approx({"forward": 0.3, "nothing": 0.1, "backward": 0.1})
    assert device.waited == (1 if behind else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parts_on_a_gpu_never_wait():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    torch.mm(matrix, matrix)
    phases = Phases(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        start = time.perf_counter()
        for _ in range(20):
            with phases.timed("forward"):
                torch.mm(matrix, matrix)
        launched = time.perf_counter() - start
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds = phases.seconds()["forward"]
    assert launched < time.perf_counter() - start
    assert 20 * 2 * 4096**3 / seconds < 3e15
