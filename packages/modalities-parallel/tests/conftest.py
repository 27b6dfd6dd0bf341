from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture
def on_ranks(tmp_path):
    """Run a function of parallel_programs.py in n processes and return what each of them returned.

    ``module:function`` is one of another file beside it.
    Every process has to end with exit code 0: a crash while the interpreter exits is a failure too.
    """

    def run(ranks: int, function: str, timeout: float = 120.0, environment: dict[str, str] | None = None, **arguments):
        outcomes = launch(tmp_path, ranks, function, timeout, environment, **arguments)
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome["exit_code"] != 0}
        assert not failed, "\n".join(f"rank {r}: exit code {o['exit_code']}\n{o['log']}" for r, o in failed.items())
        return [outcome["result"] for outcome in outcomes]

    return run


@pytest.fixture
def outcomes_on_ranks(tmp_path):
    """As ``on_ranks``, but also for processes that are meant to fail: exit codes and logs are part of what comes."""

    def run(ranks: int, function: str, timeout: float = 120.0, environment: dict[str, str] | None = None, **arguments):
        return launch(tmp_path, ranks, function, timeout, environment, **arguments)

    return run


def launch(folder: Path, ranks: int, function: str, timeout: float, environment, /, **arguments) -> list[dict]:
    port = free_port()
    processes = []
    module, _, function = function.rpartition(":")
    for rank in range(ranks):
        result, log = folder / f"result-{port}-{rank}.json", folder / f"log-{port}-{rank}.txt"
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [
            sys.executable,
            str(HERE / f"{module or 'parallel_programs'}.py"),
            function,
            json.dumps(arguments),
            str(result),
        ]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | {key: str(value) for key, value in place.items()} | (environment or {}),
            )
        processes.append((process, result, log))
    outcomes = []
    try:
        for process, result, log in processes:
            process.wait(timeout)
            value = json.loads(result.read_text()) if result.exists() else None
            outcomes.append({"exit_code": process.returncode, "result": value, "log": log.read_text(errors="replace")})
    except subprocess.TimeoutExpired:
        logs = "\n".join(log.read_text(errors="replace") for _, _, log in processes)
        pytest.fail(f"{function} on {ranks} ranks took longer than {timeout} s\n{logs}")
    finally:
        for process, _, _ in processes:
            process.kill()
            process.wait()
    return outcomes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
