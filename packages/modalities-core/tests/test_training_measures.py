"""What a run says about its own speed."""

import time

import pytest
from training_parts import Collector, TinyBatches, TinyModel, summed_cross_entropy

from modalities_core.events import StepLogged
from modalities_core.sinks.jsonl import record
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.throughput import Phases
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone


class SlowBatches(TinyBatches):
    """Each step waits for its data."""

    def micro_batches(self, step):
        time.sleep(0.02)
        return super().micro_batches(step)


class Told(Plain):
    """An executor that says how long forward and backward take."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.phases = Phases(self.world.device)

    def forward_backward(self, micro_batches):
        with self.phases.timed("forward"):
            time.sleep(0.01)
        with self.phases.timed("backward"):
            return super().forward_backward(micro_batches)


def logged(folder, executor, batches, **options):
    sink = Collector()
    parts = {"optimizer": adamw(executor.model, lr=0.01), "schedule": Constant(), "steps": 6, "log_every": 3}
    Trainer(world=executor.world, executor=executor, batches=batches, sinks=[sink], **parts | options).run(folder)
    return sink.of(StepLogged)


def test_parts_of_a_step_add_up_to_it(tmp_path):
    executor = Told(TinyModel(), summed_cross_entropy, Alone("cpu"))
    events = logged(tmp_path, executor, SlowBatches())
    for event in events:
        parts = dict(event.seconds)
        step = parts.pop("step")
        assert {"data", "forward", "backward", "other"} <= set(parts)
        assert sum(parts.values()) == pytest.approx(step)
        assert 0.02 <= parts["data"] < step
        assert 0.01 <= parts["forward"] < step
        assert min(parts.values()) >= 0


def test_every_measure_of_speed_is_logged(tmp_path):
    model = TinyModel()
    executor = Plain(model, summed_cross_entropy, Alone("cpu"))
    event = logged(tmp_path, executor, SlowBatches())[-1]
    tokens_per_step = 8 * 6
    assert event.tokens_per_second == pytest.approx(tokens_per_step / event.seconds["step"])
    assert event.tokens_per_second_per_device == event.tokens_per_second
    assert event.mfu == pytest.approx(event.tokens_per_second * model.flops_per_token(6) / event.peak_flops)
    assert event.mfu_causal is None  # the model does not tell
    assert event.peak_measured
    assert event.memory["resident"] == event.memory_bytes
    assert {"mfu_causal", "peak_flops", "peak_measured", "memory", "seconds", "skipped_steps"} <= set(record(event))
