"""Being asked to stop: by a scheduler (SIGTERM, SIGUSR1) or by the user (SIGINT)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from modalities_core.errors import Interrupted, ModalitiesError, Preempted

PREEMPTING = ("SIGTERM", "SIGUSR1")
INTERRUPTING = ("SIGINT",)


class StopSignals:
    """While entered, notes signals instead of dying of them; a second SIGINT raises KeyboardInterrupt at once.

    Outside of the main thread, where Python allows no handlers, it notes nothing. The handlers that were there before
    come back at the end.
    """

    def __init__(self) -> None:
        self.preempted = False
        self.interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for name in (*PREEMPTING, *INTERRUPTING):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._before.items():
            # None stands for a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def flags(self) -> tuple[float, float]:
        """(preempted, interrupted) as numbers that can be summed over the ranks."""
        return float(self.preempted), float(self.interrupted)

    def ask_to_stop(self) -> None:
        """As if the scheduler had asked; from any thread."""
        self.preempted = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name in PREEMPTING:
            self.preempted = True
        elif self.interrupted:
            raise KeyboardInterrupt
        else:
            self.interrupted = True


def stop_state(flags: Sequence[float]) -> str:
    """``interrupted``, ``preempted`` or empty, from the sum of all ranks' flags; the user's wish comes first."""
    preempted, interrupted = flags
    return "interrupted" if interrupted else "preempted" if preempted else ""


def stop_error(stop: str, step: int, steps: int, saved: bool) -> ModalitiesError:
    """How a run ends that was asked to; ``stop`` is of :func:`stop_state`."""
    how = "saved" if saved else "not saved, for the run has no checkpoints"
    if stop == "interrupted":
        return Interrupted(f"interrupted after step {step} of {steps}, {how}")
    return Preempted(f"asked to stop after step {step} of {steps}, {how}")
