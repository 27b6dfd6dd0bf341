"""Evaluation never waits for the device but for its result, and hears of a wish to stop."""

import os
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_parts import TinyHeldOut, TinyModel, summed_cross_entropy

from modalities_core.training.evaluator import POLL_BATCHES, Evaluation
from modalities_core.training.executor import Plain
from modalities_core.training.polling import StopPoll
from modalities_core.training.signals import StopSignals
from modalities_core.training.world import Alone


class Waits(TorchDispatchMode):
    """Counts how often the host asks for a value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


class Counting(Alone):
    """Notes how often the host had waited whenever something is reduced."""

    def __init__(self, waits):
        super().__init__("cpu")
        self.waits, self.before_sums = waits, []

    def sum(self, values):
        self.before_sums.append(self.waits.count)
        return values


def test_evaluation_waits_for_its_result_only():
    waits = Waits()
    world = Counting(waits)
    executor = Plain(TinyModel(), summed_cross_entropy, world)
    evaluation = Evaluation("h", TinyHeldOut(batches=2 * POLL_BATCHES), every=1)
    with waits, StopSignals() as signals:
        measured = evaluation.measure(executor, world, 1, StopPoll(world, signals))
    assert measured is not None
    assert world.before_sums == [0, 0, 0]  # two polls and the result


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_wish_to_stop_breaks_an_evaluation_off_and_stays_known():
    world = Alone("cpu")
    executor = Plain(TinyModel(), summed_cross_entropy, world)
    with StopSignals() as signals:
        stopping = StopPoll(world, signals)
        assert stopping() == ""
        signal.raise_signal(signal.SIGTERM)
        evaluation = Evaluation("h", TinyHeldOut(batches=POLL_BATCHES), every=1)
        assert evaluation.measure(executor, world, 1, stopping) is None
        signals.preempted = False
        assert stopping() == "preempted"


class Quiet(Alone):
    """Allows the host to wait from the moment on in which an evaluation adds up its result."""

    def sum(self, values):
        if values.dtype == torch.float64:
            torch.cuda.set_sync_debug_mode("default")
        return values


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_evaluation_on_a_gpu_waits_for_its_result_only():
    world = Quiet("cuda")
    executor = Plain(TinyModel(), summed_cross_entropy, world)
    evaluation = Evaluation("h", TinyHeldOut(batches=3 * POLL_BATCHES), every=1)
    with StopSignals() as signals:
        stopping = StopPoll(world, signals)
        first = evaluation.measure(executor, world, 1, stopping)
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = evaluation.measure(executor, world, 1, stopping)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert first is not None and second is not None
    assert second.loss == pytest.approx(first.loss)
