"""Launching ranks: exit codes, signals, logs, and who failed first. The oracle is what the ranks were made to do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modalities_core.errors import ConfigError
from modalities_parallel.launch import Nodes, cores, nodes, set_threads
from modalities_parallel.root_cause import Failure, how_it_ended, read_report, root_cause, write_report

COMMAND = Path(__file__).with_name("launch_command.py")


@pytest.fixture
def start():
    """Start a launcher; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def go(logs: Path, *program: object, ranks=2, grace=10.0, count=1, node=0, port=0, **environment: str):
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "OMP_NUM_THREADS")}
        words = [sys.executable, str(COMMAND), *map(str, (ranks, logs, grace, count, node, port, *program))]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=inherited | environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.communicate()


def test_rank_0_is_on_the_terminal_and_every_rank_in_its_log(start, tmp_path: Path) -> None:
    process = start(tmp_path / "logs", "say")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    threads = max(1, cores() // 2)
    assert out == f"out of rank 0 with {threads} threads\n"
    assert "err of rank 0 of 2\n" in err
    assert "rank 1" not in out + err
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank0.log", "rank1.log"]
    for rank in range(2):
        text = (tmp_path / "logs" / f"rank{rank}.log").read_text()
        assert f": rank {rank} of 2, process " in text
        assert f"out of rank {rank} with {threads} threads\n" in text
        assert f"err of rank {rank} of 2\n" in text


def test_the_code_is_of_who_failed_not_of_who_lost_it(start, tmp_path: Path) -> None:
    process = start(tmp_path, "data")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert out.strip() == "CAUSE 1 3 the file is damaged"


def test_a_killed_rank_is_the_cause(start, tmp_path: Path) -> None:
    process = start(tmp_path, "killed")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 6
    assert out.strip() == "CAUSE 1 -9"
    assert "memory" in how_it_ended(-9)


def test_a_rank_that_hangs_is_stopped_after_the_grace(start, tmp_path: Path) -> None:
    started = time.monotonic()
    process = start(tmp_path, "stuck", grace=0.5)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert out.split("\n")[:2] == ["told to stop", "CAUSE 1 7 bad"]
    assert time.monotonic() - started < 40


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signals_reach_every_rank_once_and_saving_is_waited_for(start, tmp_path: Path, number, code) -> None:
    process = start(tmp_path / "logs", "stop", tmp_path)
    wait_for(tmp_path)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"rank 0 saved after ['{number.name}']" in out
    assert f"rank 1 saved after ['{number.name}']" in (tmp_path / "logs" / "rank1.log").read_text()


def test_stopped_before_training_is_to_be_queued_again(start, tmp_path: Path) -> None:
    process = start(tmp_path / "logs", "early", tmp_path)
    wait_for(tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.slow
def test_every_node_ends_with_the_code_of_the_root_cause(start, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [start(tmp_path, "data", ranks=1, count=2, node=node, port=port) for node in range(2)]
    for process in both:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 3, err
        assert out.strip() == "CAUSE 1 3 the file is damaged"


def wait_for(folder: Path, ranks: int = 2) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready*"))) < ranks:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)


def failure(rank: int, code: int, message: str, nanoseconds: int) -> Failure:
    return Failure(rank, code, message, nanoseconds, "host", "log")


def test_the_first_by_time_is_the_cause_and_the_lowest_speaks_for_all() -> None:
    late, early = failure(0, 3, "a", 2), failure(1, 7, "b", 1)
    assert root_cause([late, early]) == early
    assert root_cause([failure(0, 6, "lost", 1), late]) == late
    assert root_cause([failure(1, 2, "typo", 1), failure(0, 2, "typo", 2)]) == failure(0, 2, "typo", 2)
    assert root_cause([]) is None


def test_torchrun_reads_our_reports(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "report.json"
    write_report("the file is damaged", {"TORCHELASTIC_ERROR_FILE": str(path)})
    message, nanoseconds = read_report(path)
    assert message == "the file is damaged"
    seen = ProcessFailure(local_rank=0, pid=1, exitcode=3, error_file=str(path))
    assert seen.message == message
    assert nanoseconds is not None
    assert seen.timestamp == nanoseconds // 10**9
    path.write_text("{")
    assert read_report(path) == ("", None)


def test_threads_are_the_share_of_the_cores_unless_set() -> None:
    environment: dict[str, str] = {}
    assert set_threads(10**6, environment) == 1
    assert environment == {"OMP_NUM_THREADS": "1"}
    assert set_threads(1, {}) == cores()
    assert set_threads(1, {"OMP_NUM_THREADS": "3"}) == 3


def test_nodes_are_checked() -> None:
    assert nodes() == nodes(1, None, "node0:29500") == Nodes()
    assert nodes(2, 1, "node0:29500") == Nodes(2, 1, "node0", 29500)
    with pytest.raises(ConfigError, match="no place to meet"):
        nodes(2, 0)
    with pytest.raises(ConfigError, match="0 to 1"):
        nodes(2, 2, "node0:29500")
    with pytest.raises(ConfigError, match="not HOST:PORT"):
        nodes(2, 0, "node0")
