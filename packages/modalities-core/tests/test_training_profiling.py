"""Windows of steps are recorded: which, by whom, what they leave, and that a full disk does not end a run."""

import gzip
import json

import pytest
import torch
from training_parts import Collector, TinyBatches, TinyModel, summed_cross_entropy

from modalities_core.errors import ConfigError
from modalities_core.events import Profiled, StepLogged, Warned
from modalities_core.interfaces import Hook
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.profiling import Profile
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone


def train(folder, *hooks, steps=8):
    model, world, sink = TinyModel(), Alone("cpu"), Collector()
    Trainer(
        world=world,
        executor=Plain(model, summed_cross_entropy, world),
        optimizer=adamw(model, lr=0.05),
        schedule=Constant(),
        batches=TinyBatches(),
        steps=steps,
        hooks=hooks,
        sinks=[sink],
        log_every=1,
    ).run(folder)
    return sink, model


def profiled_steps(path):
    """How many steps a trace shows, and the names in it."""
    with gzip.open(path, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    marks = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    return len(marks), {event.get("name") for event in events}


@pytest.mark.parametrize(("start", "first"), [(1, [1]), (2, [2]), (3, [3]), ([6, 1, 3], [1, 3, 6])])
def test_each_window_leaves_a_trace_and_a_table(tmp_path, start, first):
    hook = Profile(start, steps=2, rows=3)
    assert isinstance(hook, Hook)
    sink, _ = train(tmp_path, hook)
    events = sink.of(Profiled)
    assert [event.step for event in events] == [step + 1 for step in first]
    assert {event.folder for event in events} == {tmp_path / "profile"}
    for step, event in zip(first, events, strict=True):
        steps, names = profiled_steps(tmp_path / "profile" / f"step-{step:08}-rank-0.json.gz")
        assert steps == 2
        assert "aten::addmm" in names
        assert (tmp_path / "profile" / f"step-{step:08}-rank-0.txt").read_text() == event.table + "\n"
        lines = event.table.splitlines()
        assert len(lines) == 5
        assert max(map(len, lines)) < 100
        assert not any("ProfilerStep" in line for line in lines)
    assert sink.of(Warned) == []


def test_self_times_add_up_and_calls_are_per_step(tmp_path):
    sink, _ = train(tmp_path, Profile(3, steps=2, rows=1000, memory=True))
    header, *rows, total = sink.of(Profiled)[0].table.splitlines()
    assert header.split()[-2:] == ["MB", "kept"]
    times = [float(row[56:].split()[0]) for row in rows]
    assert sum(times) == pytest.approx(float(total.split()[1]), rel=0.02, abs=0.05)
    assert times == sorted(times, reverse=True)
    calls = {row[:56].strip(): float(row[56:].split()[2]) for row in rows}
    # A step has two micro batches, the model one linear layer with a bias.
    assert calls["aten::addmm"] == 2
    assert calls["aten::embedding"] == 2


def test_profiling_changes_nothing(tmp_path):
    plain, model = train(tmp_path / "plain")
    profiled, same = train(tmp_path / "profiled", Profile([2, 5], steps=2))
    losses = [[event.loss for event in sink.of(StepLogged)] for sink in (plain, profiled)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_a_window_after_the_end_is_told(tmp_path):
    sink, _ = train(tmp_path, Profile(8, steps=3))
    assert "ends with step 8, before the profile from step 8 on" in sink.of(Warned)[0].message
    assert sink.of(Profiled) == []
    assert not (tmp_path / "profile").exists()


def test_a_disk_that_refuses_costs_a_warning(tmp_path):
    (tmp_path / "profile").write_text("a file is in the way")
    sink, _ = train(tmp_path, Profile(2, steps=1))
    assert [("could not write its profile" in event.message) for event in sink.of(Warned)] == [True]
    assert len(sink.of(StepLogged)) == 8
    assert "aten::" in sink.of(Profiled)[0].table


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 0}, "steps has to be"),
        ({"rows": 0}, "rows has to be"),
        ({"start": 0}, "counted from 1"),
        ({"start": []}, "counted from 1"),
        ({"start": [3, 4], "steps": 2}, "overlap"),
        ({"ranks": []}, "ranks has to"),
        ({"ranks": [-1]}, "ranks has to"),
    ],
)
def test_mistakes_are_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        Profile(**arguments)


def test_a_rank_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="rank 1 cannot be profiled: there are 1"):
        train(tmp_path, Profile(ranks=[1]))
