"""TensorBoard, Weights & Biases and MLflow: what they record, read back by themselves, and what they survive."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modalities_core.errors import ConfigError
from modalities_core.events import Evaluated, Generated, Profiled, RunEnded, RunStarted, StepLogged
from modalities_core.interfaces import Sink
from modalities_core.sinks import extras
from modalities_core.sinks.background import Background, Degraded

NOBODY = "http://127.0.0.1:9"  # the port of a service that nobody runs any more


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


# ------------------------------------------------------------------------------------------------- TensorBoard


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_reads_what_was_written_and_a_resumed_run_replaces_repeated_steps(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from modalities_core.sinks import tensorboard

    times = iter(range(10**9, 10**9 + 10_000))
    monkeypatch.setattr(tensorboard.time, "time", lambda: next(times))
    record(tensorboard.tensorboard(), events(tmp_path / "run", 0, 6))
    record(tensorboard.tensorboard(), events(tmp_path / "run", 4, 8))
    found = accumulated(tmp_path / "run" / "tensorboard")
    losses = [(scalar.step, scalar.value) for scalar in found.Scalars("train/loss")]
    assert losses == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 9), (6, 10), (7, 11), (8, 12)]
    assert found.Scalars("data/tokens")[-1].value == 800
    assert found.Scalars("held_out/code (x)/perplexity")[-1].value == 3.5
    assert b"f():\n    <pass>" in found.Tensors("samples/'def '")[-1].tensor_proto.string_val[0]
    config = found.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert "hidden_size: 8" in config
    assert "s3cret" not in config


def test_tensorboard_goes_on_in_a_new_file_when_the_disk_is_back(tmp_path):
    pytest.importorskip("tensorboard")
    from modalities_core.sinks.tensorboard import EventFile

    path = tmp_path / "logs"
    path.write_text("a file is in the way")
    sink = EventFile(path)
    first, *others = events(tmp_path / "run")
    with pytest.raises(OSError):
        sink.consume(first)
    with pytest.raises(OSError):
        sink.consume(others[0])
    path.unlink()
    for event in others:
        sink.consume(event)
    sink.close()
    assert [scalar.step for scalar in accumulated(path).Scalars("train/loss")] == [1, 2, 3]


# -------------------------------------------------------------------------------------------- Weights & Biases


def framed(content: bytes):
    """The records of a file of Weights & Biases, which is LevelDB's log format behind seven bytes."""
    place, parts = 7, []
    while place < len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


def wandb_records(folder: Path):
    """What the offline runs below ``folder`` hold: configuration with id, rows of history, exit codes."""
    from wandb.proto.wandb_internal_pb2 import Record

    config, rows, exits = {}, [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in framed(path.read_bytes()):
            found = Record.FromString(content)
            kind = found.WhichOneof("record_type")
            if kind == "run":
                config |= {item.key: json.loads(item.value_json) for item in found.run.config.update}
                config["id"] = found.run.run_id
            if kind == "history":
                items = found.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            if kind == "exit":
                exits.append(found.exit.exit_code)
    return config, rows, exits


WANDB = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sinks_trackers import events, record
from modalities_core.sinks.wandb import wandb
mode, first, last, state = sys.argv[3:]
record(wandb("project", tags=["a"], mode=mode, timeout=3), events(Path(sys.argv[2]), int(first), int(last), state))
"""


def python(program, *arguments, env=None, timeout=120, **options):
    # Trackers look for credentials in the home folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW"))}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(arguments[1]), "NETRC": os.devnull} | (env or {})
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, **options)


@pytest.mark.slow
def test_wandb_records_offline_and_a_resumed_run_is_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    here, folder = Path(__file__).parent, tmp_path / "run"
    assert python(WANDB, here, folder, "offline", 0, 6, "preempted").returncode == 0
    config, rows, exits = wandb_records(folder)
    assert config["model"] == {"hidden_size": 8, "password": "***"}
    assert "s3cret" not in json.dumps(config)
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {step: float(step) for step in range(1, 7)}
    assert any(row.get("held_out/code (x)/perplexity") == 3.5 for row in rows)
    page = next(folder.glob("wandb/*/files/media/html/**/*.html"))
    assert "&lt;pass&gt;" in page.read_text() or "a table" in page.read_text()
    assert exits == [1]
    assert python(WANDB, here, folder, "offline", 4, 8, "done").returncode == 0
    again, rows, exits = wandb_records(folder)
    assert again["id"] == config["id"]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert exits == [1, 0]


def test_wandb_can_be_switched_off(tmp_path, monkeypatch):
    from modalities_core.sinks.wandb import Disabled, wandb

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert isinstance(wandb(mode="disabled"), Disabled)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record(wandb(), events(tmp_path / "run"))
    assert not (tmp_path / "run" / "wandb").exists()


# ------------------------------------------------------------------------------------------------------ MLflow


class Server(ThreadingHTTPServer):
    """As much of MLflow's REST interface as a run needs, in memory."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict] = {}
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.answer(path, dict(part.split("=") for part in query.split("&") if part))

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.answer(self.path, json.loads(content or b"{}"))

    def do_PUT(self):
        name = self.path.rpartition("/artifacts/")[2]
        self.server.runs["run-0"]["texts"][name] = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.reply({})

    def reply(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, path, given):
        runs, name = self.server.runs, path.rpartition("/api/2.0/mlflow/")[2]
        run = runs.get(given.get("run_id", ""), {})
        if name == "experiments/get-by-name":
            found = self.server.experiments.get(given["experiment_name"])
            if found is None:
                return self.reply({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}, 404)
            return self.reply({"experiment": {"experiment_id": found, "name": given["experiment_name"]}})
        if name == "experiments/create":
            self.server.experiments[given["name"]] = "7"
            return self.reply({"experiment_id": "7"})
        if name == "runs/create":
            given |= {"status": "RUNNING", "metrics": [], "params": {}, "texts": {}}
            runs[f"run-{len(runs)}"] = given
            return self.reply({"run": {"info": {"run_id": f"run-{len(runs) - 1}"}, "data": {}}})
        if name == "runs/update":
            run["status"] = given["status"]
            return self.reply({"run_info": {"run_id": given["run_id"]}})
        if name == "runs/log-batch":
            run["metrics"] += [(item["key"], item["step"], item["value"]) for item in given.get("metrics", [])]
            run["params"] |= {item["key"]: item["value"] for item in given.get("params", [])}
            return self.reply({})
        if name == "runs/get":
            params = [{"key": key, "value": value} for key, value in run["params"].items()]
            info = {"run_id": given["run_id"], "artifact_uri": "mlflow-artifacts:/7/run-0/artifacts"}
            return self.reply({"run": {"info": info, "data": {"params": params}}})
        return self.reply({"error_code": "ENDPOINT_NOT_FOUND", "message": path}, 404)


def test_mlflow_records_over_http_and_a_resumed_run_is_the_same_run(tmp_path):
    pytest.importorskip("mlflow")
    from modalities_core.sinks.mlflow import mlflow

    server = Server()
    record(mlflow(server.uri, "mine", tags={"a": "b"}), events(tmp_path / "run", 0, 6, "preempted"))
    (run,) = server.runs.values()
    assert (run["experiment_id"], run["run_name"], run["status"]) == ("7", "run", "KILLED")
    assert {"key": "a", "value": "b"} in run["tags"]
    assert [entry for entry in run["metrics"] if entry[0] == "train/loss"] == [
        ("train/loss", step, step) for step in range(1, 7)
    ]
    assert ("held_out/code _x_/perplexity", 6, 3.5) in run["metrics"]
    assert run["params"] == {"version": "1", "model.hidden_size": "8", "model.password": "***"}
    assert run["texts"] == {
        "samples/step-00000006-def.txt": "def f():\n    <pass>",
        "profile/step-00000006.txt": "a table",
    }
    record(mlflow(server.uri, "mine"), events(tmp_path / "run", 4, 8))
    assert len(server.runs) == 1
    assert run["status"] == "FINISHED"
    assert ("train/loss", 8, 12) in run["metrics"]
    server.shutdown()


@pytest.mark.slow
def test_mlflow_reads_back_its_own_store(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    from modalities_core.sinks.mlflow import mlflow

    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    sink = mlflow(uri, "mine", run_name="name", timeout=120)
    record(sink, [event for event in events(tmp_path / "run") if not isinstance(event, (Generated, Profiled))])
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "name")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert run.data.params["model.hidden_size"] == "8"


# ---------------------------------------------------------------------------------------------- what they survive

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


@pytest.mark.slow
def test_wandb_without_network_is_offline(tmp_path):
    pytest.importorskip("wandb")
    warning = survive(tmp_path, "wandb", WANDB_BASE_URL=NOBODY, WANDB_API_KEY="0" * 40)
    assert re.search(r"is offline \(Failed .*\); later: wandb sync .*offline-run-", warning)
    _, rows, exits = wandb_records(tmp_path / "run")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 61))
    assert exits[-1] == 0


@pytest.mark.slow
def test_wandb_without_credentials_is_offline(tmp_path):
    pytest.importorskip("wandb")
    warning = survive(tmp_path, "wandb")
    assert "offline (no API key" in warning
    assert len([row for row in wandb_records(tmp_path / "run")[1] if "train/loss" in row]) == 60


def test_wandb_waits_while_the_disk_is_full(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from modalities_core.sinks import wandb

    logged = []
    sink = wandb.WandbRun({}, "offline", 1.0)
    sink._run = SimpleNamespace(settings=SimpleNamespace(sync_dir=str(tmp_path)), log=logged.append)
    monkeypatch.setattr(wandb.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="no room left"):
        sink.consume(StepLogged(1, 10, 1.0, 0.5, 1e-3, 100, 1, 50.0))
    monkeypatch.undo()
    sink.consume(StepLogged(1, 10, 1.0, 0.5, 1e-3, 100, 1, 50.0))
    assert [row["step"] for row in logged] == [1]


@pytest.mark.slow
def test_mlflow_without_network(tmp_path):
    pytest.importorskip("mlflow")
    assert "the sink MLflow" in survive(tmp_path, "mlflow")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of resources are a matter of POSIX")
@pytest.mark.parametrize("kind", ["tensorboard", "tensorboard-elsewhere", "wandb", "mlflow-store"])
def test_a_full_disk(tmp_path, kind):
    pytest.importorskip(kind.partition("-")[0])
    warning = survive(tmp_path, kind, 12_000, WANDB_MODE="offline")
    assert "run goes on" in warning or "is the disk full" in warning


# ---------------------------------------------------------------------------------------------------- extras


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(name, monkeypatch):
    from modalities_core.registry import registry

    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=f"sink.{name} needs the package") as caught:
        registry().entry(f"sink.{name}").load()()
    assert caught.value.hint == f'pip install "modalities-core[{name}]"'


def test_an_old_package_is_refused(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda module: True)
    monkeypatch.setattr(extras, "version", lambda name: "0.9.1")
    with pytest.raises(ConfigError, match=r"needs wandb 0\.31 or newer, here is 0\.9"):
        extras.require("wandb", "wandb", (0, 31))


def test_sinks_of_trackers_are_on_threads_and_load_nothing_before_they_start():
    code = "import sys; from modalities_core.sinks.wandb import wandb; from modalities_core.sinks.mlflow import mlflow;"
    code += "from modalities_core.sinks.tensorboard import tensorboard; wandb(); mlflow(); tensorboard();"
    code += "sys.exit(any(name in sys.modules for name in ('wandb', 'mlflow', 'tensorboard', 'torch')))"
    for name in ("wandb", "mlflow", "tensorboard"):
        pytest.importorskip(name)
    assert python(code, "", Path.cwd()).returncode == 0
    assert issubclass(Degraded, Exception)
    assert Background.__doc__
