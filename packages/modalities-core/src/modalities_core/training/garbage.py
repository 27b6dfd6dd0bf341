"""Python's cycle collector on a schedule: the same steps on every rank, never in the middle of one."""

from __future__ import annotations

import gc
from typing import Self


class GarbageCollection:
    """Keeps the cycle collector out of the steps, but for every so many.

    A collection stops its rank for as long as it takes to walk through all objects, and with it the ranks that wait
    for it. So what exists at the start, and after the first step, is set apart (``gc.freeze``) and looked at no more,
    automatic collection is off, and all ranks collect after the same steps. Leaving puts everything back as it was.

    Args:
        every: steps between two collections.
    """

    def __init__(self, every: int = 1000) -> None:
        assert every > 0
        self._every = every
        self._first = True
        self._was_enabled = False
        self._was_frozen = False

    def __enter__(self) -> Self:
        """Collect once, then take over."""
        self._was_enabled, self._was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
        self._first = True
        gc.disable()
        _set_apart()
        return self

    def __exit__(self, *_: object) -> None:
        """Give back."""
        # Python has no way to tell apart what was frozen by whom.
        if not self._was_frozen:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if it is time; ``step`` counts those of the whole run, so that all ranks collect together."""
        if self._first:
            # The first step makes optimizer states, buffers and compiled code, which stay.
            self._first = False
            _set_apart()
        elif step % self._every == 0:
            gc.collect()


def _set_apart() -> None:
    gc.collect()
    gc.freeze()
