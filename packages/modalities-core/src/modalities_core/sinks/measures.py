"""What the events of a run measure, under the names that all sinks share."""

from __future__ import annotations

from modalities_core.events import CheckpointSaved, Evaluated, Event, StepLogged

_STEP = {
    "loss": "train/loss",
    "gradient_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "noise_scale": "train/noise_scale",
    "skipped_steps": "train/skipped_steps",
    "tokens": "data/tokens",
    "samples": "data/samples",
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_per_second_per_device": "speed/tokens_per_second_per_device",
    "mfu": "speed/mfu",
    "mfu_causal": "speed/mfu_causal",
}
_HELD_OUT = ("loss", "perplexity", "bits_per_byte")


def measures(event: Event) -> dict[str, float]:
    """The numbers of an event by name, such as ``train/loss`` or ``held_out/NAME/perplexity``; empty where it has none.

    Seconds are ``seconds/PART`` per step, bytes ``memory/KIND``. What was not measured is left out.
    """
    if isinstance(event, StepLogged):
        found = {name: getattr(event, field) for field, name in _STEP.items()}
        found |= {f"seconds/{part}": value for part, value in event.seconds.items()}
        memory = event.memory or {"used": event.memory_bytes}
        found |= {f"memory/{kind}": value for kind, value in memory.items()}
    elif isinstance(event, Evaluated):
        found = {f"held_out/{event.name}/{field}": getattr(event, field) for field in _HELD_OUT}
        found[f"held_out/{event.name}/seconds"] = event.seconds
    elif isinstance(event, CheckpointSaved):
        found = {f"checkpoint/{field}": getattr(event, field) for field in ("bytes", "seconds", "blocked_seconds")}
    else:
        return {}
    return {name: float(value) for name, value in found.items() if value is not None}
