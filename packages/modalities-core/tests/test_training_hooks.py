"""What a run does beside the updates: hooks, and what executors may have the loop ask for."""

import math
import time

import pytest
import torch
from training_parts import Collector, TinyBatches, TinyModel, TorchFiles, summed_cross_entropy

from modalities_core.events import StepLogged, Warned
from modalities_core.interfaces import Hook
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.executor import Plain
from modalities_core.training.gradients import Reduced
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.seeds import seed_generators
from modalities_core.training.totals import totals_from
from modalities_core.training.trainer import Trainer
from modalities_core.training.verdict import Judge
from modalities_core.training.world import Alone


class Noting:
    """A hook that writes down how it is called."""

    def __init__(self, calls, name="hook", fail_at=None, seconds=0.0):
        self.calls, self.name, self.fail_at, self.seconds = calls, name, fail_at, seconds

    def start(self, training):
        self.calls.append((self.name, "start", training.first_step, training.steps))
        if self.fail_at == 0:
            raise OSError("no room")
        training.emit(Warned(f"{self.name} speaks"))

    def after_step(self, step):
        self.calls.append((self.name, step))
        time.sleep(self.seconds)
        if self.fail_at == step:
            raise OSError("no room")

    def close(self):
        self.calls.append((self.name, "close"))


def build(hooks=(), executor=None, steps=4, batches=None, **changes):
    world, sink = Alone("cpu"), Collector()
    executor = executor or Plain(TinyModel(), summed_cross_entropy, world)
    parts = {
        "world": world,
        "executor": executor,
        "optimizer": adamw(executor.model, lr=0.05),
        "schedule": Constant(),
        "batches": batches or TinyBatches(),
        "steps": steps,
        "hooks": hooks,
        "sinks": [sink],
        "checkpoints": Checkpoints(TorchFiles(), every=2),
    }
    return Trainer(**(parts | changes)), sink


def test_hooks_are_started_called_after_each_step_and_closed(tmp_path):
    calls = []
    assert isinstance(Noting(calls), Hook)
    trainer, sink = build([Noting(calls, "a"), Noting(calls, "b")], steps=2)
    trainer.run(tmp_path)
    assert calls[:2] == [("a", "start", 0, 2), ("b", "start", 0, 2)]
    assert calls[2:6] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert calls[6:] == [("b", "close"), ("a", "close")]
    assert "a speaks" in [event.message for event in sink.of(Warned)]
    calls.clear()
    longer, _ = build([Noting(calls)], steps=3)
    longer.run(tmp_path)
    assert calls == [("hook", "start", 2, 3), ("hook", 3), ("hook", "close")]


@pytest.mark.parametrize("fail_at", [0, 2])
def test_what_a_hook_raises_ends_the_run_and_all_that_started_are_closed(tmp_path, fail_at):
    calls = []
    hooks = [Noting(calls, "a"), Noting(calls, "b", fail_at), Noting(calls, "c")]
    trainer, _ = build(hooks)
    with pytest.raises(OSError, match="no room"):
        trainer.run(tmp_path)
    closed = [name for name, *what in calls if what == ["close"]]
    assert closed == (["b", "a"] if fail_at == 0 else ["c", "b", "a"])


def test_the_time_of_hooks_is_not_training(tmp_path):
    trainer, sink = build([Noting([], seconds=0.3)], log_every=2)
    trainer.run(tmp_path)
    assert sink.of(StepLogged)[-1].seconds["step"] < 0.25


class Stateful(Plain):
    """Counts its steps, and can be told how many there were."""

    def __init__(self):
        super().__init__(TinyModel(), summed_cross_entropy, Alone("cpu"))
        self.calls, self.count = [], 0

    def prepare(self, steps, tokens_per_step):
        self.calls.append(("prepare", steps, tokens_per_step))

    def state(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]
        self.calls.append(("restore", self.count))

    def forward_backward(self, micro_batches):
        self.count += 1
        return super().forward_backward(micro_batches)


def test_executors_are_prepared_once_and_their_state_is_part_of_checkpoints(tmp_path):
    first = Stateful()
    build(executor=first, steps=2)[0].run(tmp_path)
    assert first.calls == [("prepare", 2, 48)]
    second = Stateful()
    build(executor=second, steps=5)[0].run(tmp_path)
    assert second.calls == [("restore", 2), ("prepare", 5, 48)]
    assert second.count == 5


def test_going_back_restores_the_executor_and_prepares_no_second_time(tmp_path):
    class Bad(TinyBatches):
        def micro_batches(self, step):
            batches = super().micro_batches(step)
            if step == 3:
                batches[0].weights_BT[0, 0] = math.nan
            return batches

    executor = Stateful()
    build(executor=executor, batches=Bad(), non_finite="roll_back", steps=6)[0].run(tmp_path)
    assert executor.calls == [("prepare", 6, 48), ("restore", 2)]
    assert executor.count == 6


def judged(loss, tokens, norm, clip_norm=None, scale=None, patience=0, judge=None):
    judge = judge or Judge(torch.device("cpu"), patience, clip_norm, None if scale is None else torch.tensor(scale))
    values = [torch.tensor(value, dtype=torch.float64) for value in (loss, tokens, norm)]
    verdict = judge(Reduced(*values, torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)))
    return verdict, totals_from(verdict.record.tolist())


@pytest.mark.parametrize("clip_norm", [None, 0.5, 4.0])
@pytest.mark.parametrize("scale", [None, 0.25, 1024.0])
def test_a_verdict_divides_as_torch_clips_the_gradient_of_the_mean(clip_norm, scale):
    summed = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30
    tokens = 24.0
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    parameter.grad = summed / tokens
    norm = torch.nn.utils.clip_grad_norm_([parameter], clip_norm or math.inf)
    scaled = summed * (scale or 1.0)
    verdict, totals = judged(50.0, tokens, scaled.norm().item(), clip_norm, scale)
    torch.testing.assert_close(scaled / verdict.divisor.double(), parameter.grad, rtol=1e-6, atol=0)
    assert totals.gradient_norm == pytest.approx(norm.item(), rel=1e-12)
    assert (totals.mean_loss, totals.frozen, totals.bad_ranks) == (50 / 24, False, ())


def test_a_step_without_targets_divides_to_nothing_and_counts():
    verdict, totals = judged(0.0, 0.0, 7.0, clip_norm=1.0)
    assert (torch.ones(2) / verdict.divisor).tolist() == [0, 0]
    assert not totals.frozen and math.isnan(totals.mean_loss)


def test_verdicts_are_sticky_once_patience_is_over():
    judge = Judge(torch.device("cpu"), 1, None)
    steps = [(1.0, 1.0), (math.nan, 1.0), (1.0, 1.0), (1.0, math.inf), (1.0, math.nan), (1.0, 1.0)]
    found = [judged(loss, 4.0, norm, judge=judge)[1] for loss, norm in steps]
    assert [totals.frozen for totals in found] == [False, True, False, True, True, True]
    assert [totals.halted for totals in found] == [False, False, False, False, True, True]
    assert [totals.errors_in_row for totals in found] == [0, 1, 0, 1, 2, 0]


def test_seeding_only_what_is_in_use_draws_the_same_numbers():
    torch.manual_seed(123)
    expected = torch.rand(4)
    seed_generators(123, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)
