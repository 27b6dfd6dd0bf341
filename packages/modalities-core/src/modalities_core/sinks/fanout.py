"""One event to many sinks, none of which can stop a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from modalities_core.events import Event, Warned
from modalities_core.interfaces import Sink
from modalities_core.sinks.background import Background, Degraded

_log = logging.getLogger(__name__)


class Fanout:
    """Hands each event to every sink in turn. The first failure of a sink is a warning to the others, later ones pass.

    Args:
        sinks: in the order in which they are asked.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._failed: set[int] = set()

    def consume(self, event: Event) -> None:
        """Give ``event`` to all sinks; whatever one raises stays here."""
        for place, sink in enumerate(self._sinks):
            self._guarded(place, lambda sink=sink: sink.consume(event))

    def close(self) -> None:
        """Close all sinks, also those that failed; first those on threads, whose last words the others can record."""
        places = sorted(range(len(self._sinks)), key=lambda place: not isinstance(self._sinks[place], Background))
        for place in places:
            self._guarded(place, self._sinks[place].close)

    def _guarded(self, place: int, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if place in self._failed:
                return
            self._failed.add(place)
            name = type(self._sinks[place]).__name__
            failure = f"the sink {name} failed and the run goes on: {type(error).__name__}: {error}"
            message = str(error) if isinstance(error, Degraded) else failure
            _log.warning(message)
            self.consume(Warned(message))
