"""What happens in a run, as frozen values. Sinks consume them; the loop knows no sink by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The first event of a process, and of its way on where it goes back to a checkpoint: what runs, and where to."""

    folder: Path
    first_step: int
    steps: int
    tokens_per_step: int
    parameters: int
    ranks: int
    device: str
    resumed_from: str = ""


@dataclass(frozen=True, slots=True)
class StepLogged:
    """Measures of the step just taken, averaged since the last such event where that is the natural reading.

    loss: nats per token, token-weighted mean over all ranks since the last event.
    gradient_norm: of the global gradient before clipping, at this step.
    learning_rate: the one this step used.
    tokens: consumed by the whole run so far.
    samples: likewise.
    tokens_per_second: over all ranks, since the last event, without evaluation and saving.
    mfu: model FLOPs utilisation in PaLM's convention (arXiv:2204.02311 appendix B), in which attention counts as if
        every token saw the whole sequence; None where no peak is known.
    memory_bytes: the most that tensors took on this rank's GPU, or the resident set on the CPU, now.
    seconds: per step on rank 0, the mean since the last event: ``step`` is the whole, without evaluation and saving;
        ``data``, ``forward``, ``backward``, ``optimizer`` and ``other`` add up to it, as far as the executor
        tells them apart.
    tokens_per_second_per_device: the same for one rank.
    mfu_causal: as ``mfu``, but attention counts with the half of it that causality leaves over; None where the model
        does not tell.
    peak_flops: FLOP/s of one device that both are shares of.
    peak_measured: whether that is the fastest matrix product seen on this machine rather than a data sheet's figure.
    memory: bytes on rank 0's device: ``allocated`` and ``reserved`` now and at most (``peak_allocated``,
        ``peak_reserved``) on a GPU, else the process's ``resident`` and ``peak_resident``.
    noise_scale: of the gradient, in tokens (arXiv:1812.06162), where the run measures it.
    skipped_steps: since the last event, steps that left the weights as they were because a value was not finite.
    """

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    samples: int
    tokens_per_second: float
    mfu: float | None = None
    memory_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second_per_device: float = 0.0
    mfu_causal: float | None = None
    peak_flops: float | None = None
    peak_measured: bool = False
    memory: dict[str, int] = field(default_factory=dict)
    noise_scale: float | None = None
    skipped_steps: int = 0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A held-out set was evaluated: token-weighted loss in nats per token, perplexity, and bits per byte if known."""

    step: int
    name: str
    loss: float
    perplexity: float
    tokens: int
    seconds: float
    bits_per_byte: float | None = None


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint was committed.

    step: that it is of; where it was written in the background, training has gone on since.
    seconds: from that step to the commit.
    blocked_seconds: of these, those in which training stood still.
    """

    step: int
    folder: Path
    bytes: int
    seconds: float
    blocked_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Generated:
    """A text that the model wrote after ``prompt``, as a sample of what it can do after ``step`` steps."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Profiled:
    """Some steps were profiled, the last of them ``step``: traces lie in ``folder``; rank 0's costliest operations."""

    step: int
    folder: Path
    table: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something the user should know that does not stop the run."""

    message: str


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The last event: the state is ``done``, ``preempted``, ``interrupted`` or ``failed``."""

    step: int
    state: str
    reason: str = ""


Event = RunStarted | StepLogged | Evaluated | CheckpointSaved | Generated | Profiled | Warned | RunEnded
