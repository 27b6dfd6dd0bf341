"""How well a run uses its devices: tokens per second, MFU in two conventions, memory, and where the time goes."""

from __future__ import annotations

from typing import TypedDict, cast

from modalities_core.interfaces import Executor, Model, World
from modalities_core.training.matmul import MeasuredPeak
from modalities_core.training.memory import memory, most_relevant
from modalities_core.training.parameters import whole
from modalities_core.training.peak import computing_dtype, device_peak
from modalities_core.training.throughput import mfu


class Measures(TypedDict):
    """The fields of :class:`modalities_core.events.StepLogged` of the same names."""

    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float | None
    mfu_causal: float | None
    peak_flops: float | None
    peak_measured: bool
    memory_bytes: int
    memory: dict[str, int]


class Efficiency:
    """Turns tokens and seconds of training into measures.

    Args:
        executor: tells the model and the precision.
        world: the ranks; rank 0 finds out what its device can compute at best.
        sequence_length: tokens of a sample.
    """

    def __init__(self, executor: Executor, world: World, sequence_length: int) -> None:
        # A model may count the parameters it has, and a rank of a pipeline has not all of them.
        model = cast(Model, whole(executor.model))
        self._world = world
        self._flops = model.flops_per_token(sequence_length)
        causal = getattr(model, "causal_flops_per_token", None)
        self._causal_flops: float | None = None if causal is None else causal(sequence_length)
        self._peak = device_peak(world.device, computing_dtype(executor)) if world.rank == 0 else None
        self._seconds = 0.0

    def measures(self, tokens: int, seconds: float) -> Measures:
        """Of a window of training that took ``tokens`` over all ranks; may multiply matrices for a moment.

        A measured peak is one of a machine that may have been busy: it is measured again now and then, and it is
        never below what the run itself reached, so that no MFU is above 1.
        """
        speed = tokens / seconds if seconds > 0 else 0.0
        peak = self._peak_flops(speed, seconds)
        found = memory(self._world.device)
        ranks = self._world.size
        return {
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / ranks,
            "mfu": mfu(speed, self._flops, peak, ranks),
            "mfu_causal": None if self._causal_flops is None else mfu(speed, self._causal_flops, peak, ranks),
            "peak_flops": peak,
            "peak_measured": isinstance(self._peak, MeasuredPeak),
            "memory_bytes": most_relevant(found),
            "memory": found,
        }

    def _peak_flops(self, speed: float, seconds: float) -> float | None:
        if not isinstance(self._peak, MeasuredPeak):
            return self._peak
        self._seconds += seconds
        self._peak.measure_again(self._seconds)
        self._peak.reached(speed * self._flops / self._world.size)
        return self._peak.flops or None


def time_split(parts: dict[str, float], seconds: float, steps: int) -> dict[str, float]:
    """Seconds per step of every part, of what is in none (``other``), and of the whole (``step``).

    Args:
        parts: seconds by part in a window.
        seconds: of the window.
        steps: in the window.

    Returns:
        All parts and ``other`` add up to ``step``.
    """
    known = sum(parts.values())
    # The device's clock and the host's may differ by a trifle.
    scale = min(1.0, seconds / known) if known else 1.0
    split = {name: scale * part / steps for name, part in parts.items()}
    return split | {"other": (seconds - scale * known) / steps, "step": seconds / steps}
