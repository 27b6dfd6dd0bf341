"""Stopped and resumed equals never stopped, bit for bit: weights, optimizer, and what was measured."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_parts import (
    Collector,
    TinyBatches,
    TinyHeldOut,
    TinyModel,
    TorchFiles,
    measured,
    summed_cross_entropy,
)

from modalities_core.errors import CheckpointError, Interrupted, Preempted
from modalities_core.events import RunEnded, RunStarted, Warned
from modalities_core.sinks.jsonl import JsonLines
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.executor import Plain
from modalities_core.training.lineage import step_folders
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import WarmupCosine
from modalities_core.training.seeds import step_seed
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone

STEPS = 13


class Killed(BaseException):
    """Stands for the end of the process."""


def build(steps=STEPS, batches=None, every=4, seed=0, sink=None, **changes):
    world = Alone("cpu")
    model = TinyModel(dropout=0.3)
    parts = {
        "world": world,
        "executor": Plain(model, summed_cross_entropy, world),
        "optimizer": adamw(model, lr=0.05),
        "schedule": WarmupCosine(3, STEPS),
        "batches": batches or TinyBatches(),
        "steps": steps,
        "evaluations": [Evaluation("held-out", TinyHeldOut(), every=5)],
        "checkpoints": Checkpoints(TorchFiles(), every=every, keep=2),
        "sinks": [JsonLines(), *([sink] if sink else [])],
        "log_every": 3,
        "seed": seed,
    }
    return Trainer(**(parts | changes))


def state(trainer):
    optimizer = trainer.optimizer.state_dict()["state"]
    return [*trainer.executor.model.parameters(), *(value for key in optimizer for value in optimizer[key].values())]


def assert_same(one, other):
    assert len(state(one)) == len(state(other))
    for mine, theirs in zip(state(one), state(other), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = build()
    trainer.run(folder)
    return trainer, folder


def stop_at(trainer, step, action):
    """Do ``action`` while the one-based ``step`` computes."""
    original = trainer.executor.forward_backward
    done = []

    def forward_backward(micro_batches):
        done.append(None)
        if len(done) == step:
            action()
        return original(micro_batches)

    trainer.executor.forward_backward = forward_backward


def kill():
    raise Killed


@pytest.mark.parametrize("step", [1, 4, 5, 6, 9, 12, 13])
def test_killed_and_resumed_equals_unbroken(tmp_path, unbroken, step):
    first = build()
    stop_at(first, step, kill)
    with pytest.raises(Killed):
        first.run(tmp_path)
    torch.rand(7)  # the generator's state must not matter
    second = build()
    assert second.run(tmp_path).step == STEPS
    assert_same(second, unbroken[0])
    assert measured(tmp_path) == measured(unbroken[1])


@pytest.mark.parametrize("step", [1, 3, 5, 8, 13])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)])
def test_signalled_and_resumed_equals_unbroken(tmp_path, unbroken, step, number, error):
    before = signal.getsignal(number)
    first, sink = build(), Collector()
    first = build(sink=sink)
    stop_at(first, step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(error, match=f"after step {step} of {STEPS}, saved"):
        first.run(tmp_path)
    assert signal.getsignal(number) is before
    assert sink.of(RunEnded)[0].state == error.__name__.lower()
    assert max(step_folders(tmp_path / "checkpoints")) == step
    second = build(sink=sink)
    second.run(tmp_path)
    assert sink.of(RunStarted)[-1].first_step == step
    assert_same(second, unbroken[0])
    assert measured(tmp_path) == measured(unbroken[1])


def test_preempted_many_times(tmp_path, unbroken):
    for _ in range(STEPS):
        trainer = build()
        stop_at(trainer, 1, lambda: signal.raise_signal(signal.SIGUSR1))
        with pytest.raises(Preempted) as caught:
            trainer.run(tmp_path)
        assert caught.value.exit_code == 75
    assert_same(trainer, unbroken[0])
    build().run(tmp_path)
    assert measured(tmp_path) == measured(unbroken[1])


def test_second_interrupt_stops_at_once(tmp_path):
    trainer = build()
    stop_at(trainer, 3, lambda: (signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "interrupted"


def test_signal_during_evaluation_breaks_it_off_and_saves(tmp_path, unbroken):
    class Long(TinyHeldOut):
        def __iter__(self):
            for place, batch in enumerate(super().__iter__()):
                if place == 2 and armed:
                    armed.clear()
                    signal.raise_signal(signal.SIGTERM)
                yield batch

    armed = []
    evaluation = Evaluation("held-out", Long(batches=40), every=5)
    first = build(evaluations=[evaluation])
    stop_at(first, 5, lambda: armed.append(True))
    with pytest.raises(Preempted, match="after step 5"):
        first.run(tmp_path)
    assert [line["step"] for line in measured(tmp_path) if line["event"] == "evaluated"] == [0]
    second = build(evaluations=[Evaluation("held-out", Long(batches=40), every=5)])
    second.run(tmp_path)
    assert [line["step"] for line in measured(tmp_path) if line["event"] == "evaluated"] == [0, 5, 10, 13]
    assert_same(second, unbroken[0])


def test_more_steps_continue_a_finished_run(tmp_path, unbroken):
    build(steps=7).run(tmp_path)
    longer = build()
    longer.run(tmp_path)
    assert_same(longer, unbroken[0])
    steps = [(line["event"], line["step"]) for line in measured(tmp_path)]
    assert len(steps) == len(set(steps))


def test_finished_run_says_so(tmp_path):
    build().run(tmp_path)
    content = (tmp_path / "metrics.jsonl").read_text()
    sink = Collector()
    assert build(sink=sink).run(tmp_path).step == STEPS
    assert any("already done its 13 steps" in event.message for event in sink.of(Warned))
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_killed_in_the_last_evaluation_evaluates_again(tmp_path, unbroken):
    class Deadly(TinyHeldOut):
        def __iter__(self):
            if step_folders(tmp_path / "checkpoints").get(STEPS):
                raise Killed
            yield from super().__iter__()

    with pytest.raises(Killed):
        build(evaluations=[Evaluation("held-out", Deadly(), every=5)]).run(tmp_path)
    build().run(tmp_path)
    assert measured(tmp_path) == measured(unbroken[1])


def test_fresh_keeps_the_old_run_aside(tmp_path, unbroken):
    for count in (1, 2):
        build(steps=5).run(tmp_path)
        trainer = build()
        trainer.run(tmp_path, fresh=True)
        assert_same(trainer, unbroken[0])
        assert measured(tmp_path) == measured(unbroken[1])
        aside = tmp_path / f"previous-{2 * count - 1}" if count == 1 else tmp_path / "previous-2"
        assert (aside / "metrics.jsonl").exists()
        assert step_folders(aside / "checkpoints")


def test_going_on_from_an_older_step_abandons_the_newer(tmp_path, unbroken):
    build(every=3, checkpoints=Checkpoints(TorchFiles(), every=3, keep=9)).run(tmp_path)
    sink = Collector()
    trainer = build(sink=sink, checkpoints=Checkpoints(TorchFiles(), every=5, keep=9))
    trainer.run(tmp_path, from_step=6)
    assert sink.of(RunStarted)[0].first_step == 6
    assert list(step_folders(tmp_path / "checkpoints")) == [13, 10, 6, 3]
    assert list(step_folders(tmp_path / "checkpoints" / "abandoned")) == [13, 12, 9]
    assert len([event for event in sink.of(Warned) if "abandoned" in event.message]) == 3
    assert_same(trainer, unbroken[0])
    assert measured(tmp_path) == measured(unbroken[1])
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        build(checkpoints=Checkpoints(TorchFiles(), every=5, keep=9)).run(tmp_path, from_step=7)


def test_damaged_newest_falls_back_with_a_warning(tmp_path, unbroken):
    first = build()
    stop_at(first, 11, kill)
    with pytest.raises(Killed):
        first.run(tmp_path)
    target = tmp_path / "checkpoints" / "step-00000008" / "model.pt"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    sink = Collector()
    second = build(sink=sink)
    second.run(tmp_path)
    assert sink.of(RunStarted)[0].first_step == 4
    messages = [event.message for event in sink.of(Warned)]
    assert any("step-00000008 is damaged: model.pt has another checksum" in message for message in messages)
    assert_same(second, unbroken[0])
    assert measured(tmp_path) == measured(unbroken[1])


def test_other_data_or_steps_of_another_size_are_refused(tmp_path):
    build(steps=5).run(tmp_path)
    with pytest.raises(CheckpointError, match="data tiny-0, this run has tiny-7") as caught:
        build(batches=TinyBatches(seed=7)).run(tmp_path)
    assert caught.value.exit_code == 4
    with pytest.raises(CheckpointError, match="8 samples per step, this run has 4"):
        build(batches=TinyBatches(samples_per_step=4)).run(tmp_path)


def test_changes_that_are_allowed_are_told(tmp_path):
    build(steps=5).run(tmp_path, config_hash="old")
    sink = Collector()
    trainer = build(seed=9, sink=sink)
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.7
    trainer.run(tmp_path, config_hash="new")
    messages = " ".join(event.message for event in sink.of(Warned))
    assert "seed is 9, but was 0 up to step 5" in messages
    assert "configuration has changed" in messages
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.7


def test_without_checkpoints_nothing_is_resumed(tmp_path):
    trainer = build(checkpoints=None)
    stop_at(trainer, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Preempted, match="not saved"):
        trainer.run(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoints component"):
        build(checkpoints=None).run(tmp_path, from_step=2)


def test_too_little_disk_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("modalities_core.training.resume.free_bytes", lambda folder: 1000)
    sink = Collector()
    build(sink=sink).run(tmp_path)
    assert any("the disk has 0.0 MB left" in event.message for event in sink.of(Warned))


def test_seeds_differ_by_step_rank_and_seed():
    seeds = {step_seed(seed, step, rank) for seed in range(10) for step in range(20) for rank in range(5)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
import test_training_resume as parts
trainer = parts.build()
original = trainer.executor.forward_backward
def forward_backward(batches):
    print("step", flush=True)
    import time; time.sleep(0.05)
    return original(batches)
trainer.executor.forward_backward = forward_backward
trainer.run(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_processes_killed_at_any_moment_end_like_the_unbroken_one(tmp_path, unbroken):
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    for steps in (2, 5, 3, 6):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            for _ in range(steps):
                if not process.stdout.readline():
                    break
            process.kill()
            process.wait(timeout=60)
    subprocess.run(command, check=True, env=environment, timeout=120, stdout=subprocess.DEVNULL)
    assert measured(tmp_path / "run") == measured(unbroken[1])
