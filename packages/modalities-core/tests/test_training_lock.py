"""Two jobs on one folder: the second is told so, and a job that died in whatever way is no second one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_parts import Collector, TinyBatches, TinyModel, TorchFiles, summed_cross_entropy

from modalities_core.errors import ConfigError, ResourceError
from modalities_core.training import lock
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.executor import Plain
from modalities_core.training.lock import LOCK, locked
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone

HOLD = """
import os, sys, time
from pathlib import Path
from modalities_core.training.lock import locked
from modalities_core.training.world import Alone
with locked(Path(sys.argv[1]), Alone("cpu")):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(120)
        os._exit(0)
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def hold():
    started = []

    def start(folder, how="plain"):
        command = [sys.executable, "-c", HOLD, str(folder), how]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def take(folder):
    with locked(folder, Alone("cpu")):
        return json.loads((folder / LOCK).read_text())["pid"]


def test_a_second_job_is_refused_until_the_first_is_gone(tmp_path, hold):
    folder = tmp_path / "not there yet"
    first = hold(folder)
    with pytest.raises(ConfigError, match=f"another job is running in .* \\(process {first.pid} on ") as caught:
        take(folder)
    assert caught.value.exit_code == 2
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    start = time.monotonic()
    assert take(folder) == os.getpid()
    assert time.monotonic() - start < 5
    assert (folder / LOCK).read_text() == ""


def test_children_of_a_killed_job_do_not_block(tmp_path, hold):
    first = hold(tmp_path, "fork")
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    assert take(tmp_path) == os.getpid()


def test_nested_calls_of_one_job_are_one(tmp_path):
    with locked(tmp_path, Alone("cpu")):
        assert take(tmp_path) == os.getpid()
        assert (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_job_elsewhere_is_known_by_its_touch(tmp_path, monkeypatch):
    """As on a file system that does not tell other machines of locks."""
    monkeypatch.setattr(lock, "WATCH_SECONDS", 1.5)
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.2)
    with locked(tmp_path, Alone("cpu")):
        monkeypatch.setattr(lock, "_machine", lambda: "another")
        monkeypatch.setattr(lock, "_try_lock", lambda descriptor: True)
        with pytest.raises(ConfigError, match="another job is running"):
            lock.Lock(tmp_path / LOCK)


@pytest.mark.parametrize("locks", [True, None])
def test_a_dead_job_elsewhere_is_waited_out(tmp_path, monkeypatch, locks, caplog):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_try_lock", lambda descriptor: locks)
    record = {"machine": "another", "host": "n1", "pid": 1, "since": 0.0}
    (tmp_path / LOCK).write_text(json.dumps(record))
    assert take(tmp_path) == os.getpid()
    assert "was not given back" in caplog.text


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is refused to root")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="cannot write into"):
        take(tmp_path)


def test_the_refused_job_leaves_no_trace_and_tells_no_sink(tmp_path, hold):
    hold(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    world, model, sink = Alone("cpu"), TinyModel(), Collector()
    trainer = Trainer(
        world=world,
        executor=Plain(model, summed_cross_entropy, world),
        optimizer=adamw(model, lr=0.1),
        schedule=Constant(),
        batches=TinyBatches(),
        steps=2,
        checkpoints=Checkpoints(TorchFiles(), every=1),
        sinks=[sink],
    )
    with pytest.raises(ConfigError, match="another job"):
        trainer.run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sink.events == []
    assert Path(tmp_path / LOCK).exists()
