"""How many samples each step takes while a batch grows to its final size: arithmetic, without torch.

Early in training small batches learn as much per step as large ones, so growing them saves samples: the critical batch
size starts near zero, rises fast and levels off (arXiv:2505.23971).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from modalities_core.errors import ConfigError


class Stage(BaseModel):
    """Steps of one size."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    from_step: int
    """The first of them, counted from 0."""
    samples: int
    """In each of them, over all ranks."""


@runtime_checkable
class BatchSizes(Protocol):
    """A plan by which the samples per step grow."""

    def until(self, samples_per_step: int) -> list[Stage]:
        """The stages up to the last one, which has the final ``samples_per_step``.

        Raises:
            ConfigError: the plan does not lead there.
        """
        ...


class Stages:
    """A batch that keeps one size over many steps, then jumps to the next.

    Args:
        stages: each with its first step and its samples per step; the first begins at step 0, the last has the final
            samples per step.

    Raises:
        ConfigError: they do not rise in steps from 0, a size is not positive, or one is below the one before.
    """

    def __init__(self, stages: list[Stage]) -> None:
        about = (self, "stages")
        if not stages or stages[0].from_step != 0:
            example = "such as [{from_step: 0, samples: 64}, {from_step: 1000, samples: 128}]"
            raise ConfigError("the first stage begins at step 0", hint=example, about=about)
        for stage, following in pairwise(stages):
            if following.from_step <= stage.from_step:
                message = f"a stage from step {following.from_step} cannot follow one from step {stage.from_step}"
                raise ConfigError(message, about=about)
            if following.samples < stage.samples:
                message = f"a stage of {following.samples} samples cannot follow one of {stage.samples}: batches grow"
                raise ConfigError(message, about=about)
        for stage in stages:
            if stage.samples < 1:
                message = f"samples is at least 1, not {stage.samples} as in the stage from step {stage.from_step}"
                raise ConfigError(message, about=about)
        self._stages = list(stages)

    def until(self, samples_per_step: int) -> list[Stage]:
        """The stages as they were given, if they end with ``samples_per_step``."""
        last = self._stages[-1]
        if last.samples != samples_per_step:
            raise ConfigError(
                f"the last stage has {last.samples} samples per step, but samples_per_step is {samples_per_step}",
                hint=f"end with {{from_step: STEP, samples: {samples_per_step}}}, STEP beyond {last.from_step}",
                about=(self, "stages"),
            )
        return self._stages


class Linear:
    """A batch that grows evenly in small increments, up to the final samples per step.

    Args:
        samples: in each step at first.
        increment: samples by which a step grows at once; on every rank a whole number of micro batches.
        steps: until the final size is reached.

    Raises:
        ConfigError: a number is not positive.
    """

    def __init__(self, samples: int, increment: int, steps: int) -> None:
        for name, value in (("samples", samples), ("increment", increment), ("steps", steps)):
            if value < 1:
                raise ConfigError(f"{name} is at least 1, not {value}", about=(self, name))
        self._samples, self._increment, self._steps = samples, increment, steps

    def until(self, samples_per_step: int) -> list[Stage]:
        """One stage per increment, the last from step ``steps`` on."""
        count, rest = divmod(samples_per_step - self._samples, self._increment)
        if count < 0 or rest:
            above = samples_per_step - max(0, count) * self._increment
            nearest = " or ".join(str(start) for start in (above - self._increment, above) if start > 0)
            raise ConfigError(
                f"{self._samples} samples do not become {samples_per_step} in increments of {self._increment}",
                hint=f"the nearest to start with: {nearest}",
                about=(self, "samples"),
            )
        if count > self._steps:
            raise ConfigError(
                f"{count} increments of {self._increment} samples take more than {self._steps} steps",
                hint=f"raise steps to at least {count}, or take a larger increment",
                about=(self, "steps"),
            )
        # Rounded up, so that the last increment comes at step ``steps`` exactly.
        starts = [-(-number * self._steps // count) for number in range(count + 1)] if count else [0]
        sizes = range(self._samples, samples_per_step + 1, self._increment)
        return [Stage(from_step=start, samples=size) for start, size in zip(starts, sizes, strict=True)]


class StepSamples:
    """Which samples of an endless run each step takes: all of them, one after the other.

    Args:
        stages: rising from step 0.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._steps = [stage.from_step for stage in stages]
        self._sizes = [stage.samples for stage in stages]
        before = [(following.from_step - stage.from_step) * stage.samples for stage, following in pairwise(stages)]
        self._firsts = list(accumulate(before, initial=0))

    def samples(self, step: int) -> range:
        """Global numbers of the samples of the zero-based ``step``, in time logarithmic in the number of stages."""
        stage = bisect_right(self._steps, step) - 1
        size = self._sizes[stage]
        first = self._firsts[stage] + (step - self._steps[stage]) * size
        return range(first, first + size)

    def step_at(self, samples: int) -> int | None:
        """The step that begins with the sample numbered ``samples``; None where that is within a step."""
        stage = bisect_right(self._firsts, samples) - 1
        steps, within = divmod(samples - self._firsts[stage], self._sizes[stage])
        return None if within else self._steps[stage] + steps
