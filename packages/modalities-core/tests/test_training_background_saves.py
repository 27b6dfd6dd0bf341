"""Checkpoints that are written while training goes on: the same ones, waited for where they have to be, never half."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from training_parts import Collector, StagedFiles, TinyBatches, TinyModel, TorchFiles, summed_cross_entropy

from modalities_core.errors import NumericalError, Preempted, ResourceError
from modalities_core.events import CheckpointSaved, RunEnded, Warned
from modalities_core.training import hooks
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.executor import Plain
from modalities_core.training.lineage import newest_valid, step_folders
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone

STEPS = 9


class Watched(TinyBatches):
    """Calls ``action`` with each step before it is taken."""

    def __init__(self, action=lambda step: None):
        super().__init__()
        self.action = action

    def micro_batches(self, step):
        self.action(step)
        return super().micro_batches(step)


def build(format, action=lambda step: None, steps=STEPS, every=3, loss=summed_cross_entropy, **options):
    world, model, sink = Alone("cpu"), TinyModel(dropout=0.3), Collector()
    keep = {"asynchronous": options.pop("asynchronous", True)}
    trainer = Trainer(
        world=world,
        executor=Plain(model, loss, world),
        optimizer=adamw(model, lr=0.05),
        schedule=Constant(),
        batches=Watched(action),
        steps=steps,
        checkpoints=Checkpoints(format, every=every, keep=9, **keep),
        sinks=[sink],
        log_every=1000,
        **options,
    )
    return trainer, sink


def saved(folder):
    """All that the checkpoints of a run hold, and what their manifests say of the run."""
    found = {}
    for step, path in step_folders(folder / "checkpoints").items():
        manifest = json.loads((path / "manifest.json").read_text())
        state = torch.load(path / "model.pt"), torch.load(path / "more" / "optimizer.pt")["state"]
        found[step] = state, {key: manifest[key] for key in ("samples", "parent_step", "commit", "state", "tensors")}
    return found


def leaves(value):
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key])]
    return [value]


def test_they_are_those_of_a_run_that_waits(tmp_path):
    trainer, sink = build(StagedFiles())
    trainer.run(tmp_path / "background")
    other, waited = build(StagedFiles(), asynchronous=False)
    other.run(tmp_path / "waiting")
    mine, theirs = saved(tmp_path / "background"), saved(tmp_path / "waiting")
    assert list(mine) == list(theirs) == [9, 6, 3]
    for step in mine:
        assert mine[step][1] == theirs[step][1]
        for part in range(2):
            for one, another in zip(leaves(mine[step][0][part]), leaves(theirs[step][0][part]), strict=True):
                assert torch.equal(one, another)
    assert [event.step for event in sink.of(CheckpointSaved)] == [3, 6, 9]
    assert all(event.seconds == event.blocked_seconds for event in waited.of(CheckpointSaved))


def test_training_goes_on_while_one_is_written_and_the_next_waits(tmp_path):
    going_on, log = threading.Event(), []

    def during(place):
        log.append(place)
        if place == "before":
            assert going_on.wait(30), "training stood still"
        going_on.clear()

    def action(step):
        log.append(step)
        if step == 4:  # the one after that which follows the save of step 3
            going_on.set()
        if step == 6:
            going_on.set()

    trainer, sink = build(StagedFiles(during), action, steps=8)
    trainer.run(tmp_path)
    events = sink.of(CheckpointSaved)
    assert [event.step for event in events] == [3, 6, 8]
    assert all(event.blocked_seconds < event.seconds for event in events[:2])
    assert events[2].blocked_seconds == events[2].seconds  # nothing is left to do meanwhile
    # The second is not begun before the first has ended.
    assert [place for place in log if isinstance(place, str)] == ["before", "after"] * 2
    assert log.index(4) < log.index("after") < log.index(6)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_failure_ends_the_run_as_one_in_the_foreground_does(tmp_path, place):
    calls = []

    def during(now):
        calls.append(now)
        if len(calls) > 2 and now == place:
            raise OSError(28, "No space left on device")

    trainer, sink = build(StagedFiles(during), lambda step: time.sleep(0.02), steps=1000, every=5)
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        trainer.run(tmp_path)
    assert caught.value.exit_code == 5
    ended = sink.of(RunEnded)[0]
    assert ended.state == "failed" and 10 < ended.step < 20, "it ends soon after, not with the next save"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005"]
    assert newest_valid(tmp_path / "checkpoints").manifest.step == 5


def test_a_preempted_run_waits_for_it_and_saves_once_more(tmp_path):
    def during(place):
        if place == "before":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    trainer, sink = build(StagedFiles(during), lambda step: time.sleep(0.02), steps=1000)
    with pytest.raises(Preempted):
        trainer.run(tmp_path)
    steps = list(step_folders(tmp_path / "checkpoints"))
    assert steps[1:] == [3] and 3 < steps[0] < 1000
    assert [event.step for event in sink.of(CheckpointSaved)] == [3, steps[0]]


def poisoned(at):
    calls = []

    def loss(hidden_BTD, head, batch):
        sums = summed_cross_entropy(hidden_BTD, head, batch)
        calls.append(1)
        return sums._replace(loss=sums.loss * float("nan")) if len(calls) == at else sums

    return loss


def test_a_run_that_fails_still_finishes_it(tmp_path):
    trainer, sink = build(StagedFiles(lambda place: time.sleep(0.2)), loss=poisoned(2 * 3 + 1))
    with pytest.raises(NumericalError):
        trainer.run(tmp_path)
    assert newest_valid(tmp_path / "checkpoints").manifest.step == 3
    assert [event.step for event in sink.of(CheckpointSaved)] == [3]


def test_going_back_waits_for_it(tmp_path):
    slow = StagedFiles(lambda place: time.sleep(0.2))
    trainer, sink = build(slow, loss=poisoned(2 * 3 + 1), non_finite="roll_back")
    trainer.run(tmp_path)
    assert any("went back to step 3" in event.message for event in sink.of(Warned))
    assert [event.step for event in sink.of(CheckpointSaved)] == [3, 6, 9]


def test_interrupted_twice_it_is_given_up_and_leaves_nothing_half(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "GRACE_SECONDS", 0.05)
    let_go = threading.Event()

    def action(step):
        if step == 4:
            raise KeyboardInterrupt

    trainer, _ = build(StagedFiles(lambda place: let_go.wait(30)), action)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path)
    assert newest_valid(tmp_path / "checkpoints") is None
    let_go.set()
    for thread in threading.enumerate():
        if thread.name == "background save":
            thread.join(30)


def test_where_the_copy_has_no_room_training_waits(tmp_path, caplog):
    class Full(StagedFiles):
        def stage(self, model, optimizer):
            raise MemoryError

    trainer, sink = build(Full())
    trainer.run(tmp_path)
    assert caplog.text.count("no room for a copy") == 1
    assert [event.step for event in sink.of(CheckpointSaved)] == [3, 6, 9]
    assert all(event.seconds == event.blocked_seconds for event in sink.of(CheckpointSaved))


def test_a_format_that_cannot_copy_is_waited_for(tmp_path):
    trainer, sink = build(TorchFiles())
    trainer.run(tmp_path)
    assert list(step_folders(tmp_path / "checkpoints")) == [9, 6, 3]
    assert all(event.seconds == event.blocked_seconds for event in sink.of(CheckpointSaved))
