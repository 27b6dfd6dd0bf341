"""Rank 0's record of a run: events for the sinks, and ``status.json`` for whoever watches from outside."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from modalities_core.errors import Interrupted, ModalitiesError, Preempted
from modalities_core.events import Event, RunEnded, Warned
from modalities_core.files import write_json
from modalities_core.interfaces import Sink, World
from modalities_core.sinks.fanout import Fanout

STATUS = "status.json"
STATUS_SECONDS = 1.0
"""Least time between two notes that the run goes on: a disk can take longer for one than a step does."""


class Journal:
    """Tells what happens in one call of the trainer; silent on all ranks but 0.

    Args:
        folder: the run's.
        world: tells the rank.
        sinks: take the events.
        steps: the run's, for ``status.json``.
    """

    def __init__(self, folder: Path, world: World, sinks: Sequence[Sink], steps: int) -> None:
        self.step = 0
        self._folder = folder
        self._first = world.rank == 0
        self._sinks = Fanout(sinks if self._first else ())
        self._steps = steps
        self._warned = False
        self._state = ""
        self._noted = 0.0

    def emit(self, event: Event) -> None:
        """Hand an event to every sink; never raises."""
        self._sinks.consume(event)

    def status(self, state: str, reason: str = "") -> None:
        """Replace ``status.json``; a disk that refuses is worth one warning, not the run.

        The same state again is noted once a second, without waiting for the disk.
        """
        now = time.monotonic()
        if not self._first or (state == self._state and now < self._noted + STATUS_SECONDS):
            return
        durable = state != self._state
        self._state, self._noted = state, now
        record = {
            "state": state,
            "step": self.step,
            "steps": self._steps,
            "reason": reason,
            "updated": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / STATUS, record, durable)
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.emit(Warned(f"could not write {self._folder / STATUS}: {error}"))

    def end(self, error: BaseException | None = None) -> None:
        """The last word: status, the last event, and the sinks closed."""
        state, reason = end_state(error)
        self.status(state, reason)
        self.emit(RunEnded(self.step, state, reason))
        self._sinks.close()


def end_state(error: BaseException | None) -> tuple[str, str]:
    """State and reason for the way in which a run ended."""
    if error is None:
        return "done", ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "interrupted twice: stopped at once, without saving"
    reason = error.message if isinstance(error, ModalitiesError) else f"{type(error).__name__}: {error}"
    if isinstance(error, Preempted):
        return "preempted", reason
    return ("interrupted" if isinstance(error, Interrupted) else "failed"), reason
