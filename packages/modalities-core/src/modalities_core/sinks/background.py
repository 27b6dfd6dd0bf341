"""A sink on a thread of its own: neither a slow disk nor a dead network makes training wait."""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from modalities_core.errors import ConfigError, first_line
from modalities_core.events import Event, RunStarted
from modalities_core.interfaces import Sink

CAPACITY = 10_000
TRIES = 10
LONGEST_PAUSE = 60.0
_log = logging.getLogger("modalities")


class Degraded(Exception):
    """What a sink has to say about itself, as a whole sentence: it becomes one warning and the sink goes on."""


class Background:
    """Hands events to another sink on a thread, in order, and tries again what fails.

    Events wait in a queue of 10,000; what comes while it is full is dropped. An event that the sink refuses is tried
    ten times with growing pauses, the first one, which opens the sink, as often as the run lasts. The first trouble
    is raised by the next call, once; how many events were lost is said at the end.

    Args:
        sink: does the work; whatever it raises means that the event is not recorded yet. Degraded means that it is,
            ConfigError that no event ever will be.
        name: how users know it.
        patience: seconds that ``close`` waits for the thread.
        pause: seconds before the first repetition; each later one waits twice as long, at most a minute.
    """

    def __init__(self, sink: Sink, name: str, patience: float = 30.0, pause: float = 1.0) -> None:
        self.sink = sink
        self.name = name
        self.patience = patience
        self.pause = pause
        self._queue: SimpleQueue[Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._given_up = False
        self._trouble = ""
        self._told = False
        self._taken = 0
        self._recorded = 0

    def consume(self, event: Event) -> None:
        """Put ``event`` into the queue.

        Raises:
            Degraded: the sink had trouble since the last call, for the first time.
        """
        if self._closing.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"sink {self.name}", daemon=True)
            self._thread.start()
        self._taken += 1
        if self._given_up:
            pass
        elif self._queue.qsize() >= CAPACITY:
            self._note(f"the sink {self.name} is too slow, so it leaves events out and the run goes on")
        else:
            self._queue.put(event)
        self._tell()

    def close(self) -> None:
        """Wait until all is recorded, but no longer than ``patience``.

        Raises:
            Degraded: the sink had trouble that was not told yet, or events were lost.
        """
        self._closing.set()
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(self.patience)
        # A thread that hangs is left behind; it must not go on with other events.
        self._given_up = True
        lost = self._taken - self._recorded
        if self._thread.is_alive():
            self._note(f"the sink {self.name} did not end within {self.patience:g} s")
        self._thread = None
        if lost:
            losses = f"{lost} of {self._taken} events are not recorded there"
            if self._told:
                _log.info("%s: %s", self.name, losses)
            self._trouble = f"{self._trouble or f'the sink {self.name} failed'}; {losses}"
        self._tell()

    def _work(self) -> None:
        while (event := self._queue.get()) is not None:
            if not self._given_up:
                self._recorded += self._deliver(event)
        try:
            self.sink.close()
        except Exception as error:
            self._fail(error)

    def _deliver(self, event: Event) -> bool:
        """Whether the sink took ``event``, be it at the tenth try."""
        tries = 0
        while not self._given_up:
            try:
                self.sink.consume(event)
                return True
            except Degraded as note:
                self._note(str(note))
                return True
            except ConfigError as error:
                self._given_up = True
                self._note(f"the sink {self.name} is left out and the run goes on: {error.message}")
            except Exception as error:
                self._fail(error)
                opening = isinstance(event, RunStarted)
                tries += 1
                if self._closing.is_set():
                    self._given_up = opening
                    return False
                if tries == TRIES and not opening:
                    return False
                self._closing.wait(min(LONGEST_PAUSE, self.pause * 2.0 ** min(tries - 1, 10)))
        return False

    def _fail(self, error: Exception) -> None:
        self._note(f"the sink {self.name} failed and the run goes on: {type(error).__name__}: {first_line(error)}")

    def _note(self, trouble: str) -> None:
        self._trouble = self._trouble or trouble

    def _tell(self) -> None:
        if self._trouble and not self._told:
            self._told = True
            raise Degraded(self._trouble)
