"""What the tests of checkpoints run: ``python checkpoint_programs.py FUNCTION ARGUMENTS RESULT``, arguments as JSON."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from loop_programs import build, digest
from parallel_programs import main
from parallel_small_model import SAMPLES

from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.lineage import newest_valid
from modalities_parallel import distributed, sharding  # noqa: F401  # loaded once, before the forks
from modalities_parallel.checkpoint import storage, transfer  # noqa: F401
from modalities_parallel.world import auto

STEPS, EVERY = 7, 2
STRUCK = 4
"""The checkpoint during which a rank dies."""
PLACES = [(os, name) for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "open")]
PLACES += [(storage._WatchedFile, "write")]


class Death:
    """Counts what the save in the background asks of the operating system, and ends the process at one of these."""

    def __init__(self, at: int | None) -> None:
        self.at, self.calls, self.armed = at, 0, False
        for owner, name in PLACES:
            setattr(owner, name, self.watched(getattr(owner, name)))
        begin = Checkpoints.begin

        def arming(checkpoints, shelf, world, model, optimizer, draft, failed):
            checkpoints.settle()
            self.armed = draft.step == STRUCK
            return begin(checkpoints, shelf, world, model, optimizer, draft, failed)

        Checkpoints.begin = arming

    def watched(self, function):
        def call(*arguments, **keywords):
            if self.armed and threading.current_thread().name == "background save":
                self.calls += 1
                if self.calls == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call


def train(folder: Path, dying: tuple[int, int] | None, count: bool = False) -> str:
    """One rank of a run to its end; gives a digest of all weights and states, or how often it can die."""
    world = auto(timeout_seconds=20)
    death = Death(dying[1] if dying is not None and dying[0] == world.rank else None) if count or dying else None
    trainer, _ = build(world, SAMPLES // world.size, STEPS, save=EVERY, log_every=100)
    trainer.run(folder)
    found = digest(trainer) if death is None else str(death.calls)
    del trainer
    world.close()
    return found


def fork_ranks(ranks: int, folder: Path, strike=None, **arguments) -> list[tuple[int, str]]:
    """Exit code and result of each rank of a run; importing torch once is much of the time of so small ones."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            code = 1
            try:
                for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                    os.environ.pop(name, None)
                if ranks > 1:
                    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in place.items()})
                (folder / f"result-{rank}").write_text(train(folder, **arguments))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    if strike is not None:
        strike(children[0])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    results = [folder / f"result-{rank}" for rank in range(ranks)]
    return [(code, path.read_text() if path.exists() else "") for code, path in zip(codes, results, strict=True)]


def die_and_go_on(ranks: int, folder: Path, unbroken: str, **how) -> int:
    """A run that dies, what it left, and its continuation; gives the step of the checkpoint that was there."""
    codes = [code for code, _ in fork_ranks(ranks, folder, **{"dying": None} | how)]
    assert -signal.SIGKILL in codes and 0 not in codes, codes
    found = newest_valid(folder / "checkpoints")
    assert found is not None and found.manifest.step in (STRUCK - EVERY, STRUCK)
    again = fork_ranks(ranks, folder, dying=None)
    assert again == [(0, unbroken)] * ranks, "it did not land where the run landed that never died"
    left = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left, left
    shutil.rmtree(folder)
    return found.manifest.step


def kills(folder: str, size: int, points: int, times: int) -> dict:
    """Die at ``points`` calls of a save in the background (0: all), and at ``times`` random moments of it."""
    torch.set_num_threads(1)
    parent = Path(folder)
    whole = fork_ranks(size, parent / "whole", dying=None)
    assert [code for code, _ in whole] == [0] * size
    unbroken = whole[0][1]
    counts = [int(calls) for _, calls in fork_ranks(size, parent / "count", dying=None, count=True)]
    places = [(rank, call) for rank in reversed(range(size)) for call in range(1, counts[rank] + 1)]
    chosen = [places[place * (len(places) - 1) // (points - 1)] for place in range(points)] if points else places
    steps = [die_and_go_on(size, parent / f"at-{rank}-{call}", unbroken, dying=(rank, call)) for rank, call in chosen]
    drawn = random.Random(0)
    for number in range(times):
        run = parent / f"time-{number}"

        def strike(child: int, run: Path = run) -> None:
            begun, end = run / "checkpoints" / f".step-{STRUCK:08d}.tmp", time.monotonic() + 60
            while not begun.exists() and time.monotonic() < end:
                time.sleep(0.0005)
            time.sleep(drawn.random() * 0.03)
            os.kill(child, signal.SIGKILL)

        steps.append(die_and_go_on(size, run, unbroken, strike=strike))
    return {"calls": counts, "tried": len(chosen), "steps": steps}


if __name__ == "__main__":
    main(globals())
