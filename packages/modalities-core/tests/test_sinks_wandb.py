"""Weights & Biases: what lies in its files and what its server is sent, and what a run survives."""

from __future__ import annotations

import json
import re
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sink_parts import events, python, record, survive

from modalities_core.events import StepLogged
from modalities_core.sinks import extras

NOBODY = "http://127.0.0.1:9"  # the port of a service that nobody runs any more


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
from sink_parts import events, record
from modalities_core.sinks.wandb import wandb
mode, first, last, state = sys.argv[3:]
record(wandb("project", tags=["a"], mode=mode, timeout=3), events(Path(sys.argv[2]), int(first), int(last), state))
"""


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


class Graph(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs: what it is sent is kept, what it asks for is there."""

    def log_message(self, *arguments):
        pass

    def do_PUT(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        given = json.loads(content) if content.startswith(b"{") else {}
        self.server.seen.append((self.path, given))
        name = (given.get("variables") or {}).get("name")
        bucket = {"id": "b", "name": name, "config": "{}", "historyLineCount": 0}
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        files = [
            {"name": name, "uploadUrl": self.server.uri} for name in (given.get("variables") or {}).get("files") or []
        ]
        answers = {
            "RunResumeStatus": {"model": project | {"bucket": None}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": True}},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}},
        }
        asked = next((name for name in answers if name in given.get("query", "")), "")
        content = json.dumps({"data": answers[asked]} if asked else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET = do_PUT


class GraphServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Graph)
        self.seen: list = []
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def history(self):
        streams = [given["files"] for path, given in self.seen if path.endswith("file_stream") and "files" in given]
        lines = [line for files in streams for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        return [json.loads(line) for line in lines]


def test_a_run_that_goes_back_stays_the_same_run(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from modalities_core.sinks.wandb import WandbRun

    logged, started = [], []
    sink = WandbRun({}, "offline", 1.0)

    def start(event):
        started.append(event)
        sink._run, sink._folder = SimpleNamespace(log=logged.append), tmp_path

    monkeypatch.setattr(sink, "_start", start)
    for event in events(tmp_path, 0, 3)[:4] + events(tmp_path, 1, 3)[:3]:
        sink.consume(event)
    assert len(started) == 1
    assert [row["step"] for row in logged] == [1, 2, 3, 2, 3]


@pytest.mark.slow
def test_wandb_online(tmp_path):
    pytest.importorskip("wandb")
    server, folder = GraphServer(), tmp_path / "run"
    env = {"WANDB_BASE_URL": server.uri, "WANDB_API_KEY": "0" * 40}
    program = WANDB.replace("timeout=3", "timeout=30")
    done = python(program, Path(__file__).parent, folder, "online", 0, 6, "done", env=env)
    assert done.returncode == 0, done.stderr
    losses = {row["step"]: row["train/loss"] for row in server.history() if "train/loss" in row}
    assert losses == {step: step for step in range(1, 7)}
    sent = json.dumps(server.seen)
    assert "hidden_size" in sent
    assert "s3cret" not in sent
    identity = json.loads((folder / "wandb" / "run.json").read_text())["id"]
    assert all(f"/{identity}/" in path for path, _ in server.seen if "file_stream" in path)
    server.shutdown()


LATE = """
import time
sink = wandb("project", mode=mode, timeout=5)
happened = events(Path(sys.argv[2]), int(first), int(last), state)
for event in happened[:4]:
    sink.consume(event)
time.sleep(20)
said = []
for call in [lambda event=event: sink.consume(event) for event in happened[4:]] + [sink.close]:
    try:
        call()
    except Exception as error:
        said.append(str(error))
print(*said)
"""


@pytest.mark.slow
def test_wandb_whose_server_dies(tmp_path):
    pytest.importorskip("wandb")
    server, folder = GraphServer(), tmp_path / "run"
    env = {"WANDB_BASE_URL": server.uri, "WANDB_API_KEY": "0" * 40}
    program = WANDB.partition("record(wandb(")[0] + LATE

    def die():
        while not any("file_stream" in path for path, _ in list(server.seen)):
            time.sleep(0.05)
        server.shutdown()
        server.server_close()

    threading.Thread(target=die, daemon=True).start()
    done = python(program, Path(__file__).parent, folder, "online", 0, 6, "done", env=env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"has not taken all of the run; later: wandb sync .*run-", done.stdout)
    assert done.stdout.count("\n") == 1


def test_wandb_can_be_switched_off(tmp_path, monkeypatch):
    from modalities_core.sinks.wandb import Disabled, wandb

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert isinstance(wandb(mode="disabled"), Disabled)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record(wandb(), events(tmp_path / "run"))
    assert not (tmp_path / "run" / "wandb").exists()


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
    sink._run = SimpleNamespace(log=logged.append)
    monkeypatch.setattr(wandb.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="no room left"):
        sink.consume(StepLogged(1, 10, 1.0, 0.5, 1e-3, 100, 1, 50.0))
    monkeypatch.undo()
    sink.consume(StepLogged(1, 10, 1.0, 0.5, 1e-3, 100, 1, 50.0))
    assert [row["step"] for row in logged] == [1]
