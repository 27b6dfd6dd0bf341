"""What the ranks of a test launch run, without torch: ``python launch_programs.py NAME``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from modalities_parallel.root_cause import write_report

RANK = int(os.environ["RANK"])


def say() -> int:
    print(f"out of rank {RANK} with {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    print(f"err of rank {RANK} of {os.environ['WORLD_SIZE']}", file=sys.stderr, flush=True)
    return 0


def follow(code: int, seconds: float = 0.0) -> int:
    """Rank 1 fails with ``code``; the others notice first, by losing it, and say so before it does."""
    if RANK == 1:
        time.sleep(0.3 + seconds)
        write_report("the file is damaged")
        return code
    write_report("lost the others")
    return 6


def data() -> int:
    return follow(3)


def killed() -> int:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    write_report("lost the others")
    return 6


def stuck() -> int:
    """Rank 1 fails; rank 0 hangs and does not listen to SIGTERM's first sending, as one in a collective would not."""
    if RANK == 1:
        write_report("bad")
        return 7
    signal.signal(signal.SIGTERM, lambda *_: (print("told to stop", flush=True), os._exit(9)))
    time.sleep(60)
    return 0


def stop() -> int:
    """Ends only when told, and takes a moment to save; rank 1 is done first and must not hurry rank 0."""
    told: list[int] = []
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), lambda number, _: told.append(number))
    Path(sys.argv[2], f"ready{RANK}").touch()
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    if RANK == 0:
        time.sleep(0.5)
    print(f"rank {RANK} saved after {[signal.Signals(number).name for number in told]}", flush=True)
    write_report("asked to stop, saved")
    return 130 if told[0] == signal.SIGINT else 75


def early() -> int:
    Path(sys.argv[2], f"ready{RANK}").touch()
    time.sleep(30)
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]]())
