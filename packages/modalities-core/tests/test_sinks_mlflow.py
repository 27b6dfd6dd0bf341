"""MLflow: what its server is sent, what its own store gives back, and what a run survives."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sink_parts import events, record, survive

from modalities_core.events import CheckpointSaved, Generated, Profiled
from modalities_core.sinks.background import Background, Degraded

pytest.importorskip("mlflow")


class Server(ThreadingHTTPServer):
    """As much of MLflow's REST interface as a run needs, in memory."""

    daemon_threads = True

    def __init__(self, port=0, before=None):
        super().__init__(("127.0.0.1", port), Answer)
        self.experiments: dict[str, str] = before.experiments if before else {}
        self.runs: dict[str, dict] = before.runs if before else {}
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


def test_mlflow_loses_nothing_when_its_server_comes_back(tmp_path, monkeypatch):
    from modalities_core.sinks.mlflow import MlflowRun

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Server()
    happened = events(tmp_path / "run", 0, 6)
    sink = Background(MlflowRun(server.uri, "mine", None, {}, 5), "MLflow", patience=60, pause=0.01)
    for event in happened[:3]:
        sink.consume(event)
    deadline = time.monotonic() + 60
    while not any(("train/loss", 2, 2) in run["metrics"] for run in server.runs.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = server.server_port
    server.shutdown()
    server.server_close()
    said = []
    *others, end = happened[3:]
    for event in others:
        sink.consume(event)
    while not said:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        try:
            sink.consume(CheckpointSaved(6, tmp_path, 1, 0.1))
        except Degraded as error:
            said.append(str(error))
    assert "the sink MLflow failed and the run goes on" in said[0]
    sink.consume(end)
    again = Server(port, server)
    sink.close()
    (run,) = again.runs.values()
    assert [step for name, step, _ in run["metrics"] if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert run["status"] == "FINISHED"
    again.shutdown()


@pytest.mark.slow
def test_mlflow_reads_back_its_own_store(tmp_path):
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


@pytest.mark.slow
def test_mlflow_without_network(tmp_path):
    assert "the sink MLflow" in survive(tmp_path, "mlflow")
