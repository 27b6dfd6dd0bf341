"""Loss on held-out data, every so many steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from modalities_core.errors import ConfigError, DataError
from modalities_core.events import Evaluated
from modalities_core.interfaces import Executor, HeldOut, World

POLL_BATCHES = 16


class Evaluation:
    """One held-out set and when to go through it; after the last step it always is.

    Args:
        name: how the set is called in logs.
        batches: the set.
        every: steps between two evaluations.
        at_start: evaluate before the first step too.

    Raises:
        ConfigError: the name is empty or ``every`` is not positive.
    """

    def __init__(self, name: str, batches: HeldOut, every: int, at_start: bool = True) -> None:
        if not name:
            raise ConfigError("a held-out set needs a name", about=(self, "name"))
        if every < 1:
            raise ConfigError(f"every has to be at least 1 step, not {every}", about=(self, "every"))
        self.name = name
        self.batches = batches
        self.every = every
        self.at_start = at_start

    def due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after ``step`` of ``steps`` steps; before the first one ``step`` is 0."""
        if step == 0:
            return self.at_start
        return step % self.every == 0 or step == steps

    def measure(
        self, executor: Executor, world: World, step: int, stopping: Callable[[], str] = lambda: ""
    ) -> Evaluated | None:
        """Go through the set once; token-weighted over all ranks, in one reduction at the end; collective.

        Args:
            executor: runs the model.
            world: the ranks.
            step: completed steps, for the event.
            stopping: asked on all ranks alike every 16 batches; evaluation breaks off when it answers.

        Returns:
            The measures, or None if broken off.

        Raises:
            DataError: no target of the set counts.
        """
        start = time.perf_counter()
        dtype = torch.float32 if world.device.type == "mps" else torch.float64
        sums = torch.zeros(2, dtype=dtype, device=world.device)
        for place, batch in enumerate(self.batches):
            if place % POLL_BATCHES == POLL_BATCHES - 1 and stopping():
                return None
            sums += torch.stack(executor.evaluate(batch)).to(sums)
        loss, tokens = world.sum(sums).tolist()
        if tokens == 0:
            raise DataError(f"the held-out set {self.name!r} has no target that counts", about=(self, "batches"))
        loss /= tokens
        bytes_per_token = self.batches.bytes_per_token
        return Evaluated(
            step=step,
            name=self.name,
            loss=loss,
            perplexity=perplexity(loss),
            tokens=round(tokens),
            seconds=time.perf_counter() - start,
            bits_per_byte=loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        )


def perplexity(loss: float) -> float:
    """The exponential of the loss in nats per token; infinite where that exceeds the floats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
