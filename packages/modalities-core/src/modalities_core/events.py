"""What happens in a run, as frozen values. Sinks consume them; the loop knows no sink by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The first event of a process: what will run and where it writes."""

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
    tokens_per_second: over all ranks, since the last event, without evaluation and saving.
    mfu: model FLOPs utilisation (PaLM convention, arXiv:2204.02311 appendix B) or None where no peak is known.
    memory_bytes: peak on this rank's device, or resident set on the CPU.
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
    """A checkpoint was committed."""

    step: int
    folder: Path
    bytes: int
    seconds: float


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


Event = RunStarted | StepLogged | Evaluated | CheckpointSaved | Warned | RunEnded
