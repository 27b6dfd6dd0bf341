"""Run commands in turn and measure them: wall time, CPU seconds and peak memory of the whole process tree.

CPU seconds (user and system, of every process) hardly move when the machine has other work, wall time does: claims are
made per CPU second.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_FOR_ORPHANS = 10.0
PR_SET_CHILD_SUBREAPER = 36
# Nothing may ask a hub or report to a service while it is timed.
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Usage:
    """What a run took.

    wall: seconds.
    cpu: user and system seconds of all processes.
    peak_rss: bytes, the largest sum over the process tree that was seen, or the largest of one process; pages shared by
        two processes count twice.
    output: what it printed on stdout.
    """

    wall: float
    cpu: float
    peak_rss: int
    output: str


class RunError(Exception):
    """A command failed or took too long; the text is the end of what it printed."""


def run(
    commands: Sequence[Sequence[str]],
    *,
    cores: int,
    timeout: float,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    memory_limit: int | None = None,
) -> Usage:
    """Run ``commands`` one after the other, as one job.

    Args:
        commands: each a program and its arguments.
        cores: pin every process to this many.
        timeout: seconds for each command; it is killed with its children behind them.
        folder: where to run.
        environment: variables beside those of this process.
        memory_limit: bytes of private memory a process may have.

    Raises:
        RunError: one of them failed.
    """
    usages = [_run(command, cores, timeout, folder, environment or {}, memory_limit) for command in commands]
    return Usage(
        sum(usage.wall for usage in usages),
        sum(usage.cpu for usage in usages),
        max(usage.peak_rss for usage in usages),
        "".join(usage.output for usage in usages),
    )


def _run(
    command: Sequence[str],
    cores: int,
    timeout: float,
    folder: Path | None,
    environment: Mapping[str, str],
    memory_limit: int | None,
) -> Usage:
    def prepare() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
        if memory_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        _adopt_orphans(True)
        started = time.monotonic()
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder, start_new_session=True,
            preexec_fn=prepare, env={**os.environ, **QUIET, **environment},
        )  # fmt: skip
        peak = _Peak(process.pid)
        late = threading.Timer(timeout, _kill, [process.pid])
        late.start()
        try:
            # wait4 alone tells the resources of this child and of all it waited for.
            _, status, resources = os.wait4(process.pid, 0)
            wall = time.monotonic() - started
            cpu = _cpu_seconds(resources) + _orphans(process.pid)
        except BaseException:
            _kill(process.pid)
            os.waitpid(process.pid, 0)
            raise
        finally:
            late.cancel()
            peak.stop()
            _adopt_orphans(False)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
        if process.returncode:
            reason = "took too long" if wall >= timeout else f"ended with {process.returncode}"
            last = " | ".join((texts[1] or texts[0]).strip().splitlines()[-3:])
            raise RunError(f"{Path(command[0]).name} {reason}: {last}")
    # ru_maxrss would not do: it begins with what this process held when it forked.
    return Usage(wall, cpu, peak.bytes, texts[0])


def _cpu_seconds(resources: resource.struct_rusage) -> float:
    return resources.ru_utime + resources.ru_stime


def _adopt_orphans(wanted: bool) -> None:
    """Whether processes whose parent ended become children of this one, and can be waited for."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _orphans(group: int) -> float:
    """CPU seconds of what a command left behind; a server that starts its workers is not waited for by anybody else."""
    cpu, end = 0.0, time.monotonic() + SECONDS_FOR_ORPHANS
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, _, resources = os.wait4(-group, os.WNOHANG)
            if pid:
                cpu += _cpu_seconds(resources)
            elif time.monotonic() > end:
                _kill(group)
                end = float("inf")
            else:
                time.sleep(0.01)
    return cpu


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class _Peak:
    """Looks at the memory of a process tree now and then, on a thread."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            found = [_memory(pid) for pid in process_tree(self._pid)]
            self.bytes = max(self.bytes, sum(now for now, _ in found), *(highest for _, highest in found))


def process_tree(pid: int) -> list[int]:
    """``pid`` and all that descends from it."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{task}/children").read_text()
            children += [int(word) for word in text.split()]
    return [pid, *(found for child in children for found in process_tree(child))]


def _memory(pid: int) -> tuple[int, int]:
    """Bytes a process holds in memory now, and held at most since it began its program."""
    sizes = {"VmRSS": 0, "VmHWM": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] = 1024 * int(value.split()[0])
    return sizes["VmRSS"], sizes["VmHWM"]


def in_turn(names: Sequence[str], rounds: int, one: Callable[[str, int], dict | None]) -> dict[str, list[dict]]:
    """Run every name once per round, starting one further each round, so that a slow minute hits all alike.

    Args:
        names: what to run.
        rounds: how often.
        one: runs a name in a round; None drops the name from later rounds.
    """
    results: dict[str, list[dict]] = {name: [] for name in names}
    alive = list(names)
    for number in range(rounds):
        first = number % len(alive) if alive else 0
        for name in alive[first:] + alive[:first]:
            found = one(name, number)
            if found is None:
                alive = [other for other in alive if other != name]
            else:
                results[name].append(found)
    return {name: found for name, found in results.items() if found}


def medians(rounds: Sequence[Mapping]) -> dict:
    """The median over rounds of every number; of anything else, the first."""
    first = rounds[0]
    numbers = (int, float)
    return {
        key: statistics.median(entry[key] for entry in rounds)
        if isinstance(value, numbers) and not isinstance(value, bool)
        else value
        for key, value in first.items()
    }


def markdown(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def provenance(hidden: Sequence[str] = ()) -> dict:
    """What a result has to carry: command, commit, date and machine.

    Args:
        hidden: options whose value is a place on this machine, left out of the command.
    """
    words = [Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *sys.argv[1:]]
    for option in hidden:
        if option in words:
            words[words.index(option) + 1] = option.removeprefix("--").upper()
    return {
        "command": "python " + " ".join(words),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "packages", "tools")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def origin(result: dict) -> list[str]:
    """Lines of Markdown that say where a result with a ``provenance`` comes from."""
    return [
        "", f"- command: `{result['command']}`", f"- commit: {result['commit']}", f"- date: {result['date']}",
        f"- machine: {result['cpu']}, {result['cores']} cores, load {result['load']:.1f}",
        f"- versions: {json.dumps(result['versions'])}",
    ]  # fmt: skip


def tell(result: dict, text: str, path: Path | None) -> None:
    """Print ``text`` and, where there is a path, write ``path``.json and ``path``.md."""
    print(text)
    if path is not None:
        save(path, result, text)


def _git(*words: str) -> str:
    found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=30, check=False)
    return found.stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def save(path: Path, result: dict, text: str) -> None:
    """Write ``path``.json and ``path``.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text + "\n")
