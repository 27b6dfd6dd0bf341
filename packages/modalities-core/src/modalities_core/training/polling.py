"""Hearing of a wish to stop during long stretches without a step, such as an evaluation."""

from __future__ import annotations

import torch

from modalities_core.interfaces import World
from modalities_core.training.ledger import Ledger
from modalities_core.training.signals import StopSignals, stop_state


class StopPoll:
    """Asks all ranks whether one of them was asked to stop; the host does not wait for the answer but hears it later.

    Args:
        world: the ranks.
        signals: that this rank was given.
    """

    def __init__(self, world: World, signals: StopSignals) -> None:
        self._world = world
        self._signals = signals
        self._ledger: Ledger[None] = Ledger(world.device)
        self._heard = ""

    def __call__(self) -> str:
        """What :func:`~modalities_core.training.signals.stop_state` gives for all ranks together; collective.

        On a GPU that of two calls before; once it is not empty it stays.
        """
        flags = torch.zeros(2, device=self._world.device)
        for place, flag in enumerate(self._signals.flags()):
            if flag:
                flags[place].fill_(flag)
        self._ledger.add(None, self._world.sum(flags))
        for _, asked in self._ledger.read():
            self._heard = stop_state(asked) or self._heard
        return self._heard
