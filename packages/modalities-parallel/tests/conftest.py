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
ALIKE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Forks:
    """``forks.py``, started when the first test needs it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, commands: list[list[str]], logs: list[Path], environments, timeout: float) -> list[int | None]:
        """Exit codes of programs that run at the same time; None of those that took longer than ``timeout``."""
        if self.process is None or self.process.poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen([sys.executable, str(HERE / "forks.py")], env=os.environ | ALIKE, **pipes)
            assert self._answer() == "ready"
        ranks = [
            {"command": command[1:], "log": str(log), "environment": environment}
            for command, log, environment in zip(commands, logs, environments, strict=True)
        ]
        self.process.stdin.write(json.dumps({"ranks": ranks, "timeout": timeout}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait(30)

    def _answer(self):
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="session")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def on_ranks(outcomes_on_ranks):
    """Run a function of parallel_programs.py in n processes and return what each of them returned.

    ``module:function`` is one of another file beside it.
    Every process has to end with exit code 0: a crash while the interpreter exits is a failure too.
    """

    def run(ranks: int, function: str, timeout: float = 120.0, environment: dict[str, str] | None = None, **arguments):
        outcomes = outcomes_on_ranks(ranks, function, timeout, environment, **arguments)
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome["exit_code"] != 0}
        assert not failed, "\n".join(f"rank {r}: exit code {o['exit_code']}\n{o['log']}" for r, o in failed.items())
        return [outcome["result"] for outcome in outcomes]

    return run


@pytest.fixture
def outcomes_on_ranks(tmp_path, forks):
    """As ``on_ranks``, but also for processes that are meant to fail: exit codes and logs are part of what comes."""

    def run(ranks: int, function: str, timeout: float = 120.0, environment: dict[str, str] | None = None, **arguments):
        port = free_port()
        module, _, name = function.rpartition(":")
        program = str(HERE / f"{module or 'parallel_programs'}.py")
        results = [tmp_path / f"result-{port}-{rank}.json" for rank in range(ranks)]
        logs = [tmp_path / f"log-{port}-{rank}.txt" for rank in range(ranks)]
        commands = [[sys.executable, program, name, json.dumps(arguments), str(result)] for result in results]
        places = [place(rank, ranks, port) | ALIKE | (environment or {}) for rank in range(ranks)]
        # What is loaded may already have read the environment.
        start = spawn if environment else forks.run
        codes = start(commands, logs, places, timeout)
        written = [log.read_text(errors="replace") for log in logs]
        if None in codes:
            pytest.fail(f"{function} on {ranks} ranks took longer than {timeout} s\n" + "\n".join(written))
        values = [json.loads(result.read_text()) if result.exists() else None for result in results]
        found = zip(codes, values, written, strict=True)
        return [{"exit_code": code, "result": value, "log": log} for code, value, log in found]

    return run


def place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher says to a rank."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}


def spawn(commands, logs, environments, timeout: float) -> list[int | None]:
    """As ``Forks.run``, in processes that start from nothing."""
    processes = []
    for command, log, environment in zip(commands, logs, environments, strict=True):
        with log.open("wb") as stream:
            options = {"stdout": stream, "stderr": subprocess.STDOUT, "env": os.environ | environment}
            processes.append(subprocess.Popen(command, **options))
    try:
        return [process.wait(timeout) for process in processes]
    except subprocess.TimeoutExpired:
        return [None for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
