"""What a run says about its own speed."""

import time

import pytest
import torch
from training_parts import Collector, TinyBatches, TinyModel, TorchFiles, summed_cross_entropy

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.events import StepLogged
from modalities_core.sinks.jsonl import record
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.executor import Plain
from modalities_core.training.noise_scale import NoiseScale, estimates
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone


class SlowBatches(TinyBatches):
    """Each step waits for its data."""

    def micro_batches(self, step):
        time.sleep(0.02)
        return super().micro_batches(step)


class Told(Plain):
    """An executor whose forward takes a while."""

    def forward_backward(self, micro_batches):
        with self.phases.timed("forward"):
            time.sleep(0.01)
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


def test_executor_tells_the_gradient_of_the_first_micro_batch():
    model = TinyModel()
    executor = Plain(model, summed_cross_entropy, Alone("cpu"))
    noise = NoiseScale(executor, executor.world, list(model.parameters()))
    batches = TinyBatches(8, 2).micro_batches(0)
    sums = noise.forward_backward(batches)
    large = sum(value.grad.double().square().sum() for value in model.parameters())
    model.zero_grad()
    first = executor.forward_backward(batches[:1])
    small = sum(value.grad.double().square().sum() for value in model.parameters())
    expected = torch.stack(estimates(small, first.tokens, large, sums.tokens)) / 100
    assert noise.state() == pytest.approx(expected.tolist(), rel=1e-4)


def test_noise_scale_is_logged_and_changes_nothing_and_resumes(tmp_path):
    def run(folder, steps=9, **options):
        executor = Plain(TinyModel(), summed_cross_entropy, Alone("cpu"))
        parts = {"steps": steps, "log_every": 1, "checkpoints": Checkpoints(TorchFiles(), every=4)}
        return logged(tmp_path / folder, executor, TinyBatches(8, 2), **parts | options)

    without, whole = run("without"), run("whole", noise_scale=True)
    assert {event.noise_scale for event in without} == {None}
    assert [event.loss for event in whole] == [event.loss for event in without]
    assert [event.gradient_norm for event in whole] == [event.gradient_norm for event in without]
    assert any(event.noise_scale is not None for event in whole)
    first = run("broken", 5, noise_scale=True)
    second = run("broken", noise_scale=True)
    assert [event.noise_scale for event in first + second] == [event.noise_scale for event in whole]


def test_noise_scale_of_single_micro_batches_is_refused(tmp_path):
    executor = Plain(TinyModel(), summed_cross_entropy, Alone("cpu"))
    with pytest.raises(ConfigError, match="one micro batch of 8"):
        logged(tmp_path, executor, TinyBatches(8, 8), noise_scale=True)


class GrowingBatches(TinyBatches):
    """Two samples in each of the first steps, then eight."""

    def __init__(self, until=3):
        super().__init__(8, 2)
        self.until = until

    def samples(self, step):
        first = 2 * min(step, self.until) + 8 * max(0, step - self.until)
        return range(first, first + (2 if step < self.until else 8))

    def micro_batches(self, step):
        samples = self.samples(step)
        return [self.batch(samples[start : start + 2]) for start in range(0, len(samples), 2)]


def test_steps_of_any_size_count_what_they_took(tmp_path):
    executor = Plain(TinyModel(), summed_cross_entropy, Alone("cpu"))
    events = logged(tmp_path, executor, GrowingBatches(), steps=6, log_every=2)
    assert [(event.step, event.samples, event.tokens) for event in events] == [
        (1, 2, 12),
        (2, 4, 24),
        (4, 14, 84),
        (6, 30, 180),
    ]
    for event, steps, tokens in zip(events, (1, 1, 2, 2), (12, 12, 60, 96), strict=True):
        assert event.tokens_per_second == pytest.approx(tokens / steps / event.seconds["step"])


def test_runs_with_growing_steps_resume_exactly_or_are_refused(tmp_path):
    def run(folder, steps, batches):
        executor = Plain(TinyModel(), summed_cross_entropy, Alone("cpu"))
        parts = {"steps": steps, "log_every": 1, "checkpoints": Checkpoints(TorchFiles(), every=2)}
        events = logged(tmp_path / folder, executor, batches, **parts)
        return [(event.step, event.samples, event.loss) for event in events], list(executor.model.parameters())

    whole, weights = run("whole", 7, GrowingBatches())
    first, _ = run("broken", 2, GrowingBatches())
    second, resumed = run("broken", 7, GrowingBatches())
    assert first + second == whole
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, weights, strict=True))
    with pytest.raises(CheckpointError, match=r"begins step 8 with sample 32 where that ended before 38"):
        run("broken", 9, GrowingBatches(4))
    # A stage that begins where the run is now changes nothing of what it was.
    assert run("grown", 2, TinyBatches(2, 2))[0][-1][1] == 4
    assert [samples for _, samples, _ in run("grown", 5, GrowingBatches(2))[0]] == [12, 20, 28]
