"""Which rank of a launch failed first, and what it said.

A rank that fails writes why into the file that ``TORCHELASTIC_ERROR_FILE`` names, in the form torchrun reads too. Who
launched the ranks takes the earliest of these reports, but none of a rank that only lost the others: that one follows.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from modalities_core.errors import EXIT_DISTRIBUTED

REPORT_FILE = "TORCHELASTIC_ERROR_FILE"


class Failure(NamedTuple):
    """How one rank ended that did not end well.

    rank: among all ranks of the run.
    exit_code: of the process; -N if signal N killed it.
    message: what the rank reported; empty if it could not.
    nanoseconds: when, since 1970.
    host: where it ran.
    log: its log file.
    """

    rank: int
    exit_code: int
    message: str
    nanoseconds: int
    host: str
    log: str

    @property
    def process_code(self) -> int:
        """The exit code for the whole launch: the rank's own, or 6 where a signal killed it."""
        return self.exit_code if self.exit_code > 0 else EXIT_DISTRIBUTED


def write_report(message: str, environment: Mapping[str, str] = os.environ) -> None:
    """Leave ``message`` for whoever launched this process; nothing where nobody did, or where it cannot be written."""
    path = environment.get(REPORT_FILE)
    if not path:
        return
    now = time.time_ns()
    try:
        Path(path).write_text(json.dumps({"message": message, "timestamp": now // 10**9, "nanoseconds": now}))
    except OSError:
        # The process is failing of something else, which is on its standard error as well.
        return


def read_report(path: Path) -> tuple[str, int | None]:
    """Message and time in nanoseconds of a report; empty and None where there is none."""
    try:
        report = json.loads(path.read_text())
        return str(report["message"]), int(report["nanoseconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", None


def root_cause(failures: Iterable[Failure]) -> Failure | None:
    """The failure that the others followed from; None where there is none.

    Ranks with exit code 6 lost another rank or waited for one in vain: they are only taken where nothing else failed.
    """
    known = sorted(failures, key=lambda one: (one.exit_code == EXIT_DISTRIBUTED, one.nanoseconds))
    if not known:
        return None
    # Ranks that say the same had the same trouble: who was a millisecond earlier means nothing, the lowest speaks.
    same = [one for one in known if (one.exit_code, one.message) == (known[0].exit_code, known[0].message)]
    return min(same, key=lambda one: one.rank) if known[0].message else known[0]


def how_it_ended(exit_code: int) -> str:
    """``exit code 3`` or ``killed by SIGKILL``, with what a person would look for."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    often = {"SIGKILL": ", as the kernel does when memory runs out", "SIGBUS": ", as happens when /dev/shm is full"}
    return f"killed by {name}{often.get(name, '')}"
