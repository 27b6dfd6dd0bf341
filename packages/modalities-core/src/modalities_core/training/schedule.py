"""Learning rate schedules: pure functions of the zero-based step, giving a factor on the peak learning rate.

Warmup is linear and its first step is not zero: step s of w warmup steps has the factor (s + 1) / w. A decay over d
steps reaches its final factor one step after its last, so that no step is wasted at a learning rate of zero; later
steps stay there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modalities_core.errors import ConfigError


@dataclass(frozen=True)
class Constant:
    """Linear warmup, then the peak.

    Args:
        warmup_steps: steps until the peak.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _at_least(self, "warmup_steps", 0)

    def __call__(self, step: int) -> float:
        """The factor for the zero-based ``step``."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Linear:
    """Linear warmup, then a straight line down to ``final``.

    Args:
        warmup_steps: steps until the peak.
        steps: all steps, warmup included.
        final: factor on the peak at the end.
    """

    warmup_steps: int
    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _check_warmup(self, self.warmup_steps, self.steps)
        _fraction(self, "final")

    def __call__(self, step: int) -> float:
        """The factor for the zero-based ``step``."""
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        return 1 - (1 - self.final) * _progress(step, self.warmup_steps, self.steps)


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warmup, then half a cosine down to ``final`` (Loshchilov and Hutter, arXiv:1608.03983, no restarts).

    Args:
        warmup_steps: steps until the peak.
        steps: all steps, warmup included.
        final: factor on the peak at the end.
    """

    warmup_steps: int
    steps: int
    final: float = 0.1

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _check_warmup(self, self.warmup_steps, self.steps)
        _fraction(self, "final")

    def __call__(self, step: int) -> float:
        """The factor for the zero-based ``step``."""
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        return _cosine(1.0, self.final, _progress(step, self.warmup_steps, self.steps))


@dataclass(frozen=True)
class Exponential:
    """Linear warmup, then down to ``final`` by the same factor in every step.

    Args:
        warmup_steps: steps until the peak.
        steps: all steps, warmup included.
        final: factor on the peak at the end, above 0.
    """

    warmup_steps: int
    steps: int
    final: float = 0.1

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _check_warmup(self, self.warmup_steps, self.steps)
        _fraction(self, "final")
        _above_zero(self)

    def __call__(self, step: int) -> float:
        """The factor for the zero-based ``step``."""
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        return self.final ** _progress(step, self.warmup_steps, self.steps)


@dataclass(frozen=True)
class InverseSqrt:
    """Linear warmup, then one over the square root of the step (Vaswani et al., arXiv:1706.03762, section 5.3).

    It needs no number of steps, so a run can go on for as long as it likes.

    Args:
        warmup_steps: steps until the peak, at least 1; after four times as many the factor is a half.
    """

    warmup_steps: int

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _at_least(self, "warmup_steps", 1)

    def __call__(self, step: int) -> float:
        """The factor for the zero-based ``step``."""
        return min(_warmup(step, self.warmup_steps), math.sqrt(self.warmup_steps / (step + 1)))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warmup, the peak for most of the run, a decay at its end (Hu et al., arXiv:2404.06395).

    Args:
        warmup_steps: steps until the peak.
        decay_steps: steps from the peak to ``final``, the last ones.
        steps: all steps, warmup and decay included.
        final: factor on the peak at the end.
        shape: of the decay; ``sqrt`` is one minus the square root (Haegele et al., arXiv:2405.18392); ``exponential``,
            the same factor in every step, is that of the paper and needs a ``final`` above 0.
    """

    warmup_steps: int
    decay_steps: int
    steps: int
    final: float = 0.0
    shape: Literal["linear", "cosine", "sqrt", "exponential"] = "linear"

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _check_warmup(self, self.warmup_steps, self.steps)
        _at_least(self, "decay_steps", 0)
        _fraction(self, "final")
        if self.warmup_steps + self.decay_steps > self.steps:
            total = f"{self.warmup_steps} + {self.decay_steps} = {self.warmup_steps + self.decay_steps}"
            message = f"warmup_steps and decay_steps take {total} steps, but the schedule has {self.steps}"
            raise ConfigError(message, about=(self, "decay_steps"))
        if self.shape not in ("linear", "cosine", "sqrt", "exponential"):
            message = f"shape is linear, cosine, sqrt or exponential, not {self.shape!r}"
            raise ConfigError(message, about=(self, "shape"))
        if self.shape == "exponential":
            _above_zero(self)

    def __call__(self, step: int) -> float:
        """The factor for the zero-based ``step``."""
        if step < self.steps - self.decay_steps:
            return _warmup(step, self.warmup_steps)
        progress = _progress(step, self.steps - self.decay_steps, self.steps)
        if self.shape == "cosine":
            return _cosine(1.0, self.final, progress)
        if self.shape == "exponential":
            return self.final**progress
        return 1 - (1 - self.final) * (math.sqrt(progress) if self.shape == "sqrt" else progress)


@dataclass(frozen=True)
class Step:
    """Linear warmup, then the peak multiplied by ``gamma`` once more after every ``every`` steps.

    Args:
        every: steps between two drops, counted from step 0.
        gamma: factor of each drop.
        warmup_steps: steps until the peak.
    """

    every: int
    gamma: float = 0.1
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _at_least(self, "every", 1)
        _at_least(self, "warmup_steps", 0)
        if not self.gamma > 0:
            raise ConfigError(f"gamma has to be positive, not {self.gamma}", about=(self, "gamma"))

    def __call__(self, step: int) -> float:
        """The factor for the zero-based ``step``."""
        return _warmup(step, self.warmup_steps) * self.gamma ** (step // self.every)


@dataclass(frozen=True)
class OneCycle:
    """Up to the peak and down far below the start (Smith and Topin, arXiv:1708.07120).

    Args:
        steps: all steps.
        warmup: share of the steps on the way up, in (0, 1).
        initial_division: the peak divided by the first learning rate.
        final_division: the first learning rate divided by the last.
        shape: of both halves.
    """

    steps: int
    warmup: float = 0.3
    initial_division: float = 25.0
    final_division: float = 1e4
    shape: Literal["linear", "cosine"] = "cosine"

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _at_least(self, "steps", 1)
        if not 0 < self.warmup < 1:
            raise ConfigError(f"warmup has to lie between 0 and 1, not {self.warmup}", about=(self, "warmup"))
        if self.warmup * self.steps <= 1:
            message = f"warmup {self.warmup} of {self.steps} steps is {self.warmup * self.steps:g} steps: more than one"
            raise ConfigError(f"{message} is needed", about=(self, "warmup"))
        for name in ("initial_division", "final_division"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name} has to be at least 1, not {getattr(self, name)}", about=(self, name))
        if self.shape not in ("linear", "cosine"):
            raise ConfigError(f"shape is linear or cosine, not {self.shape!r}", about=(self, "shape"))

    def __call__(self, step: int) -> float:
        """The factor for the zero-based ``step``."""
        first, top = 1 / self.initial_division, self.warmup * self.steps - 1
        last = first / self.final_division
        if step <= top:
            return self._between(first, 1.0, step / top)
        return self._between(1.0, last, min(1.0, (step - top) / (self.steps - 1 - top)))

    def _between(self, start: float, end: float, progress: float) -> float:
        return start + (end - start) * progress if self.shape == "linear" else _cosine(start, end, progress)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _check_warmup(schedule: object, warmup_steps: int, steps: int) -> None:
    _at_least(schedule, "steps", 1)
    _at_least(schedule, "warmup_steps", 0)
    if warmup_steps > steps:
        message = f"warmup_steps is {warmup_steps}, more than the {steps} steps of the schedule"
        raise ConfigError(message, about=(schedule, "warmup_steps"))


def _at_least(schedule: object, name: str, least: int) -> None:
    if not getattr(schedule, name) >= least:
        raise ConfigError(f"{name} has to be at least {least}, not {getattr(schedule, name)}", about=(schedule, name))


def _fraction(schedule: object, name: str) -> None:
    if not 0 <= getattr(schedule, name) <= 1:
        message = f"{name} is a factor on the peak between 0 and 1, not {getattr(schedule, name)}"
        raise ConfigError(message, about=(schedule, name))


def _above_zero(schedule: Exponential | WarmupStableDecay) -> None:
    if not schedule.final > 0:
        raise ConfigError("an exponential decay never reaches zero: give a final above 0", about=(schedule, "final"))
