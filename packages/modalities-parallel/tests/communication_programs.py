"""What the ranks of a test of the communication test run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from modalities_parallel import communication, pairs
from modalities_parallel.distributed import Distributed
from modalities_parallel.world import auto


def report(slow: int | None = None, what: str = "", **degrees: int):
    world = auto(**degrees)
    assert isinstance(world, Distributed)
    if what == "compute":
        # Other work on this machine makes any rank slower, but does not use up its processor time.
        communication.time.perf_counter = time.process_time
    if world.rank == slow and what == "compute":
        seconds_of = communication.seconds_of

        def slowly(run, device, repeats, together=True):
            # Three times the work, and only for the product, so that nothing else is slower.
            work = run if together else lambda: [run() for _ in range(3)]
            return seconds_of(work, device, repeats, together)

        communication.seconds_of = slowly
    if world.rank == slow and what == "messages":
        send = dist.send
        pairs.dist.send = lambda *arguments: (time.sleep(0.01), send(*arguments))
    if world.rank == slow and what == "clock":
        now = time.time
        pairs.time.time = lambda: now() + 100
    found = communication.communication_test(world.meshes, torch.device("cpu"), sizes=(4096, 65536))
    world.close()
    return found._asdict() | {"wrong_clocks": found.wrong_clocks()}


if __name__ == "__main__":
    name, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(globals()[name](**json.loads(arguments))))
