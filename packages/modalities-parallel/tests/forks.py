"""Starts the ranks of tests: reads jobs as lines of JSON, answers each with a line of exit codes.

Loading torch takes longer than most programs. So it is done once, here, and each rank is a fork of this process, which
has no threads; from then on it is what ``python PROGRAM ARGUMENTS`` would be, and ends as that does.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import time

import torch.distributed.pipelining  # noqa: F401  # loaded so that no program has to

from modalities_core.training import trainer  # noqa: F401
from modalities_parallel import distributed, fsdp, sharding  # noqa: F401
from modalities_parallel.checkpoint import sharded, transfer  # noqa: F401


def wait(children: list[int], deadline: float) -> list[int | None]:
    """Exit codes, negative for signals; None of those that had to be killed because they took too long."""
    codes: dict[int, int | None] = {}
    while len(codes) < len(children):
        late = time.monotonic() > deadline
        for child in set(children) - codes.keys():
            if late:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if ended:
                codes[child] = None if late else os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[child] for child in children]


def become(command: list[str], log: str, environment: dict[str, str]) -> dict:
    """Run a program as the main one of this process; its names, which live as long as the process."""
    os.environ.update(environment)
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = command
    return runpy.run_path(command[0], run_name="__main__")


def next_rank() -> dict | None:
    """In a fork what it has to become, in this process None at the end."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in job["ranks"]:
            child = os.fork()
            if child == 0:
                return rank
            children.append(child)
        print(json.dumps(wait(children, time.monotonic() + job["timeout"])), flush=True)
    return None


if __name__ == "__main__":
    # So that no fork copies what is loaded by looking for garbage.
    gc.collect()
    gc.freeze()
    rank = next_rank()
    names = None if rank is None else become(**rank)
