"""Work that goes on in a thread of its own while training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """One call, begun at once; whoever asks for its result waits for it.

    The thread does not keep the process alive: what has to be finished has to be asked for.

    Args:
        call: what to do.
        failed: called in that thread as soon as ``call`` has raised.
    """

    def __init__(self, call: Callable[[], T], failed: Callable[[], None]) -> None:
        self._call = call
        self._on_failure = failed
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background save", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or the other."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the call has raised."""
        return self._error is not None

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, at most so long."""
        self._thread.join(seconds)

    def result(self) -> T:
        """What the call gave; waits for it.

        Raises:
            BaseException: what the call raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._values[0]

    def _run(self) -> None:
        try:
            self._values.append(self._call())
        except BaseException as error:
            self._error = error
            self._on_failure()
