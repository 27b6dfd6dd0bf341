"""What the tests of sinks share: the events of a short run, a sink that keeps them, sinks that cannot work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from modalities_core.events import Evaluated, Generated, Profiled, RunEnded, RunStarted, StepLogged
from modalities_core.interfaces import Sink


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.events = []
        self.closed = False

    def consume(self, event):
        self.events.append(event)

    def close(self):
        self.closed = True


def started(folder, first_step=0):
    folder.mkdir(exist_ok=True)
    (folder / "config.resolved.yaml").write_text("version: 1\nmodel: {hidden_size: 8, password: s3cret}\n")
    return RunStarted(folder, first_step, 10, 100, 1000, 1, "cpu")


def events(folder, first_step=0, last=3, state="done"):
    """A run from ``first_step`` to ``last`` whose loss is the step plus its first step."""
    steps = range(first_step + 1, last + 1)
    logged = [StepLogged(step, 10, step + first_step, 0.5, 1e-3, step * 100, step, 50.0) for step in steps]
    texts = [Generated(last, "def ", "f():\n    <pass>"), Profiled(last, folder, "a table")]
    held_out = [Evaluated(last, "code (x)", 1.25, 3.5, 100, 0.1)]
    return [started(folder, first_step), *logged, *held_out, *texts, RunEnded(last, state)]


def record(sink, happened):
    assert isinstance(sink, Sink)
    for event in happened:
        sink.consume(event)
    sink.close()


def python(program, *arguments, env=None, timeout=120, **options):
    # Trackers look for credentials in the home folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW"))}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(arguments[1]), "NETRC": os.devnull} | (env or {})
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, **options)


RUN = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
folder, kind, limit = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
from training_parts import Collector, TinyBatches, TinyModel, summed_cross_entropy
from modalities_core.events import RunEnded, StepLogged, Warned
from modalities_core.sinks.jsonl import JsonLines
from modalities_core.sinks.mlflow import mlflow
from modalities_core.sinks.tensorboard import tensorboard
from modalities_core.sinks.wandb import wandb
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone

sinks = {
    "wandb": lambda: wandb("project", timeout=3),
    "mlflow": lambda: mlflow("http://127.0.0.1:9", timeout=3),
    "mlflow-store": lambda: mlflow(f"sqlite:///{folder / 'runs.db'}", timeout=15),
    "tensorboard": tensorboard,
    "tensorboard-elsewhere": lambda: tensorboard(folder / "run" / "tensorboard"),
}
if kind == "tensorboard-elsewhere":
    (folder / "run").mkdir()
    (folder / "run" / "tensorboard").write_text("a file is in the way")
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
model, world, kept = TinyModel(), Alone("cpu"), Collector()
trainer = Trainer(
    world=world, executor=Plain(model, summed_cross_entropy, world), optimizer=adamw(model, lr=0.05),
    schedule=Constant(), batches=TinyBatches(), steps=60, log_every=1, sinks=[kept, sinks[kind]()],
)
start = time.perf_counter()
trainer.run(folder / "run")
steps = kept.of(StepLogged)
print(json.dumps({
    "warnings": [event.message for event in kept.of(Warned)],
    "ended": [event.state for event in kept.of(RunEnded)],
    "steps": len(steps),
    "seconds": time.perf_counter() - start,
}))
"""


def survive(tmp_path, kind, limit=0, timeout=120, **env):
    """Train with a sink that cannot work; the run has to be done, with one warning, which is returned."""
    done = python(RUN, Path(__file__).parent, tmp_path, kind, limit, env=env, timeout=timeout)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ended"] == ["done"]
    assert result["steps"] == 60
    assert len(result["warnings"]) == 1, result["warnings"]
    return result["warnings"][0]
