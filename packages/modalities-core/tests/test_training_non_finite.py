"""Losses and gradients that are not finite: refused on the device, then stopped, left out or gone back from."""

import copy
import math
import os
import signal

import pytest
import torch
from training_parts import Collector, TinyBatches, TinyModel, TorchFiles, measured, summed_cross_entropy

from modalities_core.errors import NumericalError, Preempted
from modalities_core.events import RunStarted, StepLogged, Warned
from modalities_core.sinks.jsonl import JsonLines
from modalities_core.training import ledger
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_core.training.verdict import MOST_OVERFLOWS
from modalities_core.training.world import Alone


@pytest.fixture(params=[0, 2], ids=["heard at once", "heard two steps later"], autouse=True)
def lag(request, monkeypatch):
    monkeypatch.setattr(ledger, "lag_of", lambda device: request.param)
    return request.param


class CountingModel(TinyModel):
    """Has a buffer that every forward changes, as running statistics do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens_BT):
        if self.training:
            self.seen += tokens_BT.sum()
        return super().forward(tokens_BT)


class Poisoned(TinyBatches):
    """The second micro batch of some steps is bad; ``take`` says which step's samples a step gets."""

    def __init__(self, bad=(), poison=math.nan, take=None, at=None):
        super().__init__()
        self.bad, self.poison = bad, poison
        self.take = take or (lambda step: step)
        self.at = at or {}
        self.now = None

    def micro_batches(self, step):
        if step in self.at:
            self.at.pop(step)()
        self.now = step
        batches = super().micro_batches(self.take(step))
        if step in self.bad and self.poison is not None:
            batches[1].weights_BT[0, 0] = self.poison
        return batches


def build(folder_every=2, steps=8, batches=None, optimizer=None, **changes):
    world, model, sink = Alone("cpu"), CountingModel(), Collector()
    batches = batches or Poisoned()
    if batches.poison is None:  # the loss is fine, the gradient is not
        model.hidden.weight.register_hook(lambda grad: grad * (math.inf if batches.now in batches.bad else 1))
    parts = {
        "world": world,
        "executor": Plain(model, summed_cross_entropy, world),
        "optimizer": (optimizer or adamw)(model, lr=0.05),
        "schedule": Constant(),
        "batches": batches,
        "steps": steps,
        "sinks": [sink, JsonLines()],
        "checkpoints": Checkpoints(TorchFiles(), every=folder_every),
        "log_every": 100,
    }
    return Trainer(**(parts | changes)), sink


def rmsprop(model, lr):
    return torch.optim.RMSprop(model.parameters(), lr=lr)


def state(trainer):
    """Everything a step could change."""
    optimizer = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    model = trainer.executor.model
    return [*model.parameters(), *model.buffers(), *(value for key in optimizer for value in optimizer[key].values())]


def assert_same(one, other):
    for mine, theirs in zip(state(one), state(other), strict=True):
        assert torch.equal(mine, theirs)


def warnings(sink):
    return [event.message for event in sink.of(Warned)]


@pytest.mark.parametrize("optimizer", [adamw, rmsprop])
@pytest.mark.parametrize("poison", [math.nan, math.inf, None], ids=["nan loss", "inf loss", "inf gradient"])
def test_stop_changes_nothing_and_names_the_batch(tmp_path, poison, optimizer):
    good, _ = build(steps=3, optimizer=optimizer, checkpoints=None)
    good.run(tmp_path / "good")
    bad, _ = build(batches=Poisoned([3], poison), optimizer=optimizer, checkpoints=None)
    with pytest.raises(NumericalError, match=r"^step 4 .* the samples are 24 to 31 of the run") as caught:
        bad.run(tmp_path / "bad")
    assert caught.value.exit_code == 7
    assert ("the loss is finite;" in caught.value.message) == (poison is None)
    assert_same(bad, good)


def test_stopped_runs_stop_again_where_they_did_and_may_go_on_by_another_policy(tmp_path):
    for _ in range(2):
        trainer, sink = build(batches=Poisoned([3]))
        with pytest.raises(NumericalError, match="^step 4 "):
            trainer.run(tmp_path)
        assert sink.of(RunStarted)[0].first_step in (0, 2)
    assert sink.of(RunStarted)[0].first_step == 2
    trainer, _ = build(batches=Poisoned([3]), non_finite="skip")
    assert trainer.run(tmp_path).step == 8


@pytest.mark.parametrize("optimizer", [adamw, rmsprop])
@pytest.mark.parametrize("poison", [math.nan, None], ids=["nan loss", "inf gradient"])
def test_skip_leaves_the_batches_out(tmp_path, poison, optimizer):
    bad = [2, 3, 5]
    skipping, sink = build(batches=Poisoned(bad, poison), optimizer=optimizer, non_finite="skip", log_every=4)
    assert skipping.run(tmp_path / "skip").step == 8
    kept = [step for step in range(8) if step not in bad]
    without, _ = build(steps=5, batches=Poisoned(take=lambda step: kept[step]), optimizer=optimizer)
    without.run(tmp_path / "without")
    assert_same(skipping, without)
    told = [message for message in warnings(sink) if "left out" in message]
    assert [message.split(" has ")[0] for message in told] == ["step 3", "step 4", "step 6"]
    assert "the second in a row" in told[1] and "the samples are 24 to 31" in told[1]
    assert [event.skipped_steps for event in sink.of(StepLogged)] == [0, 2, 1]
    assert all(math.isfinite(event.loss) for event in sink.of(StepLogged))


def test_too_many_skips_in_a_row_stop(tmp_path):
    good, _ = build(steps=2)
    good.run(tmp_path / "good")
    trainer, _ = build(batches=Poisoned([2, 3, 4]), non_finite="skip", most_skips=2)
    with pytest.raises(NumericalError, match="^step 5 .* 3 steps in a row, and most_skips is 2"):
        trainer.run(tmp_path / "bad")
    assert_same(trainer, good)
    enough, _ = build(batches=Poisoned([2, 3, 5, 6]), non_finite="skip", most_skips=2)
    assert enough.run(tmp_path / "enough").step == 8


def test_skips_in_a_row_are_counted_over_a_restart(tmp_path, lag):
    def terminate():
        signal.raise_signal(signal.SIGTERM)

    batches = Poisoned(range(2, 20), at={3 - lag: terminate})
    first, _ = build(steps=20, batches=batches, non_finite="skip", most_skips=4, folder_every=100)
    with pytest.raises(Preempted, match="after step 4"):
        first.run(tmp_path)
    second, sink = build(steps=20, batches=Poisoned(range(2, 20)), non_finite="skip", most_skips=4)
    with pytest.raises(NumericalError, match="^step 7 .* 5 steps in a row"):
        second.run(tmp_path)
    assert sink.of(RunStarted)[0].first_step == 4
    assert "the third in a row" in next(message for message in warnings(sink) if "left out" in message)


def left_out(first, behind):
    """The batches of a run that went back and goes on behind a bad one."""
    return lambda step: step if step < first else step - first + behind


@pytest.mark.parametrize("poison", [math.nan, None], ids=["nan loss", "inf gradient"])
def test_roll_back_goes_on_behind_the_bad_batch(tmp_path, poison):
    trainer, sink = build(batches=Poisoned([5], poison), non_finite="roll_back", log_every=1)
    progress = trainer.run(tmp_path / "back")
    assert (progress.step, progress.samples) == (8, 64)
    other, _ = build(batches=Poisoned(take=left_out(4, 6)), log_every=1)
    other.run(tmp_path / "other")
    assert_same(trainer, other)
    assert [event.first_step for event in sink.of(RunStarted)] == [0, 4]
    assert any("went back to step 4" in message and "samples are 40 to 47" in message for message in warnings(sink))
    assert measured(tmp_path / "back") == measured(tmp_path / "other")


@pytest.mark.parametrize("kill_at", [4, 6, 9])
def test_roll_back_and_killed_ends_like_not_killed(tmp_path, kill_at):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    bad = [5, 8]
    straight, _ = build(steps=10, batches=Poisoned(bad), non_finite="roll_back", log_every=1)
    straight.run(tmp_path / "straight")
    broken, _ = build(steps=10, batches=Poisoned(bad, at={kill_at: kill}), non_finite="roll_back", log_every=1)
    with pytest.raises(Killed):
        broken.run(tmp_path / "broken")
    resumed, _ = build(steps=10, batches=Poisoned(bad), non_finite="roll_back", log_every=1)
    resumed.run(tmp_path / "broken")
    assert_same(resumed, straight)
    assert measured(tmp_path / "broken") == measured(tmp_path / "straight")


def test_two_bad_batches_behind_one_checkpoint(tmp_path):
    trainer, sink = build(steps=12, folder_every=4, batches=Poisoned([5, 7]), non_finite="roll_back")
    trainer.run(tmp_path / "back")
    other, _ = build(steps=12, batches=Poisoned(take=left_out(4, 8)))
    other.run(tmp_path / "other")
    assert_same(trainer, other)
    assert [event.first_step for event in sink.of(RunStarted)] == [0, 4, 4]


def test_too_many_roll_backs_stop(tmp_path):
    trainer, sink = build(batches=Poisoned(range(5, 99)), non_finite="roll_back", most_roll_backs=2)
    with pytest.raises(NumericalError, match="went back 2 times already"):
        trainer.run(tmp_path)
    assert len(sink.of(RunStarted)) == 3


def test_nothing_to_go_back_to(tmp_path):
    trainer, _ = build(batches=Poisoned([1]), non_finite="roll_back", folder_every=4)
    with pytest.raises(NumericalError, match=r"^step 2 .* no checkpoint yet") as caught:
        trainer.run(tmp_path)
    assert type(caught.value) is NumericalError


class Scaler:
    """Halves at an overflow, keeps all it hears."""

    def __init__(self, scale):
        self.scale = torch.tensor(scale, dtype=torch.float32)
        self.heard = []

    def update(self, overflowed):
        self.heard.append(overflowed.clone())
        self.scale.copy_(torch.where(overflowed > 0, self.scale / 2, self.scale))


class Scaled:
    """Gradients of a scaled loss, infinite where it is scaled beyond ``limit``."""

    def __init__(self, scale, limit):
        self.model = CountingModel()
        self.inner = Plain(self.model, summed_cross_entropy, Alone("cpu"))
        self.scaler, self.limit = Scaler(scale), limit

    def forward_backward(self, micro_batches):
        sums = self.inner.forward_backward(micro_batches)
        for parameter in self.model.parameters():
            parameter.grad *= torch.where(self.scaler.scale > self.limit, math.inf, self.scaler.scale)
        return sums

    def evaluate(self, batch):
        return self.inner.evaluate(batch)


def build_scaled(scale, limit, **changes):
    executor = Scaled(scale, limit)
    return executor, *build(executor=executor, optimizer=lambda _, lr: adamw(executor.model, lr=lr), **changes)


def test_overflows_of_a_scaled_loss_are_skipped_in_silence(tmp_path):
    executor, trainer, sink = build_scaled(64.0, 16.0)
    trainer.run(tmp_path / "scaled")
    assert [int(value) for value in executor.scaler.heard] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert executor.scaler.scale == 16
    plain, _ = build(steps=6, batches=Poisoned(take=lambda step: step + 2))
    plain.run(tmp_path / "plain")
    assert_same(trainer, plain)
    assert not any("left out" in message for message in warnings(sink))
    assert sum(event.skipped_steps for event in sink.of(StepLogged)) == 2


def test_a_loss_that_is_not_finite_is_no_overflow(tmp_path):
    executor, trainer, _ = build_scaled(4.0, 16.0, batches=Poisoned([2]), checkpoints=None)
    with pytest.raises(NumericalError, match="^step 3 "):
        trainer.run(tmp_path)
    assert not any(executor.scaler.heard)


def test_overflows_at_any_scale_stop(tmp_path):
    _, trainer, _ = build_scaled(4.0, -1.0, steps=MOST_OVERFLOWS + 5, checkpoints=None)
    with pytest.raises(NumericalError, match=rf"^step {MOST_OVERFLOWS + 1} .* at ever lower scales"):
        trainer.run(tmp_path)


def test_signals_are_heard_as_late_as_totals_and_saved_then(tmp_path, lag):
    straight, _ = build()
    straight.run(tmp_path / "straight")
    batches = Poisoned(at={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    first, _ = build(batches=batches, folder_every=100)
    with pytest.raises(Preempted, match=f"after step {3 + lag} of 8, saved"):
        first.run(tmp_path / "signalled")
    second, sink = build()
    second.run(tmp_path / "signalled")
    assert sink.of(RunStarted)[0].first_step == 3 + lag
    assert_same(second, straight)


def test_a_report_hears_all_steps_up_to_it(tmp_path):
    trainer, sink = build(batches=Poisoned([3]), log_every=4, checkpoints=None)
    with pytest.raises(NumericalError, match="^step 4 "):
        trainer.run(tmp_path)
    assert [event.step for event in sink.of(StepLogged)] == [1]
