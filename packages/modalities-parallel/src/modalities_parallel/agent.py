"""The processes of one node: started, watched, stopped. Which ranks they are is for torch's elastic agent to say."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from modalities_core.errors import EXIT_PREEMPTED
from modalities_parallel.node_failures import NodeFailures
from modalities_parallel.rank_log import RankLog
from modalities_parallel.root_cause import REPORT_FILE, Failure, read_report, root_cause

FORWARDED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS_UNTIL_KILLED = 3
KILL_SECONDS = 30.0


class RankAgent(SimpleElasticAgent):
    """Runs one command per rank of this node, and remembers who failed first.

    torch's own agent stops all ranks the moment one of them ends, and keeps times in whole seconds. This one hands
    signals on and waits for what the ranks make of them, gives the others time to end by themselves after a failure,
    and tells the agents of other nodes about it.

    Args:
        spec: how many ranks, and where the nodes meet.
        command: what each rank runs.
        logs: folder of the ranks' logs, which exists.
        grace_seconds: how long ranks may go on after another has failed.
    """

    def __init__(self, spec: WorkerSpec, command: Sequence[str], logs: Path, grace_seconds: float) -> None:
        super().__init__(spec)
        self._command = list(command)
        self._logs = logs
        self._grace_seconds = grace_seconds
        self._reports = tempfile.TemporaryDirectory(prefix="modalities-ranks-")
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._rank_logs: dict[int, RankLog] = {}
        self._signals: list[int] = []
        self._sent = 0
        self._failures: dict[int, Failure] = {}
        self._stopped: set[int] = set()
        self._failed_at: float | None = None
        self._nodes: NodeFailures | None = None
        self.cause: Failure | None = None

    # What torch's agent asks of a subclass: start, watch, stop.

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for name in FORWARDED:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._note)
        store, node, count = worker_group.store, worker_group.group_rank, worker_group.group_world_size
        assert store is not None and node is not None and count is not None, "torch's agent has no rendezvous"
        self._nodes = NodeFailures(store, node, count)
        self._failures, self._stopped, self._failed_at = {}, set(), None
        for worker in worker_group.workers:
            log = RankLog(self._logs / f"rank{worker.global_rank}.log", on_terminal=worker.global_rank == 0)
            self._rank_logs[worker.local_rank] = log
            environment = os.environ | self._environment(worker_group, worker)
            # A session of its own: Ctrl-C reaches the ranks through us, once.
            process = subprocess.Popen(
                self._command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=log.stdout, stderr=log.stderr,
            )  # fmt: skip
            log.follow(process, worker.global_rank, worker.world_size)
            self._processes[worker.local_rank] = process
        return {local_rank: process.pid for local_rank, process in self._processes.items()}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._forward_signals()
        for worker in worker_group.workers:
            self._look_at(worker)
        running = [p for p in self._processes.values() if p.poll() is None]
        assert self._nodes is not None
        if self._failed_at is None and (self._failures or self._nodes.elsewhere()):
            self._failed_at = time.monotonic()
            self._nodes.announce()
        if running and not self._is_over():
            return RunResult(state=WorkerState.HEALTHY)
        self._end(worker_group)
        causes = [failure for rank, failure in self._failures.items() if rank not in self._stopped]
        known = self._nodes.exchange(root_cause(causes)) if self._failed_at is not None else []
        self.cause = root_cause(known or self._failures.values())
        if self.cause is None:
            done = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=done)
        failed = {
            rank: ProcessFailure(local_rank=0, pid=0, exitcode=failure.exit_code, error_file="")
            for rank, failure in (self._failures or {self.cause.rank: self.cause}).items()
        }
        return RunResult(state=WorkerState.FAILED, failures=failed)

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:
        self._end(worker_group)

    def _shutdown(self, *_: Any, **__: Any) -> None:
        self._end(self._worker_group)
        self._reports.cleanup()

    # How it is done.

    def _environment(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        agent_store = getattr(group.spec.rdzv_handler, "use_agent_store", False)
        return {
            "RANK": str(worker.global_rank),
            "WORLD_SIZE": str(worker.world_size),
            "LOCAL_RANK": str(worker.local_rank),
            "LOCAL_WORLD_SIZE": str(group.spec.local_world_size),
            "GROUP_RANK": str(group.group_rank),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RUN_ID": group.spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": str(agent_store),
            "PYTHONUNBUFFERED": "1",
            REPORT_FILE: str(self._report(worker)),
        }

    def _report(self, worker: Worker) -> Path:
        return Path(self._reports.name) / f"rank{worker.global_rank}.json"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _forward_signals(self) -> None:
        """Hand on what came since the last time; the third signal is the last that anybody waits for."""
        for number in self._signals[self._sent :]:
            self._send(signal.SIGKILL if self._sent + 1 >= SIGNALS_UNTIL_KILLED else number)
            self._sent += 1

    def _send(self, number: int) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def _look_at(self, worker: Worker) -> None:
        code = self._processes[worker.local_rank].poll()
        if not code or worker.global_rank in self._failures:
            return
        message, nanoseconds = read_report(self._report(worker))
        if code == -signal.SIGTERM and self._sent:
            # It was not training yet, or no more: nothing is lost, and the scheduler should queue it again.
            code, message = EXIT_PREEMPTED, "asked to stop outside of training"
        self._failures[worker.global_rank] = Failure(
            rank=worker.global_rank,
            exit_code=code,
            message=message,
            nanoseconds=nanoseconds or time.time_ns(),
            host=platform.node(),
            log=str(self._rank_logs[worker.local_rank].path),
        )

    def _is_over(self) -> bool:
        return self._failed_at is not None and time.monotonic() - self._failed_at > self._grace_seconds

    def _end(self, group: WorkerGroup) -> None:
        """Make sure that no rank runs any more, first kindly; their logs are complete afterwards."""
        late = [w for w in group.workers if w.local_rank in self._processes]
        late = [worker for worker in late if self._processes[worker.local_rank].poll() is None]
        self._stopped.update(worker.global_rank for worker in late)
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + KILL_SECONDS
        for worker in late:
            try:
                self._processes[worker.local_rank].wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._processes[worker.local_rank].kill()
                self._processes[worker.local_rank].wait()
        for worker in group.workers:
            if worker.local_rank in self._processes:
                self._look_at(worker)
        for log in self._rank_logs.values():
            log.close()
        self._processes.clear()
        self._rank_logs.clear()
