"""Which samples a step takes."""

from __future__ import annotations

from modalities_core.interfaces import Batches


def samples_of(batches: Batches, step: int) -> range:
    """Global numbers of the samples of the zero-based ``step``; steps of one size where ``batches`` do not tell."""
    told = getattr(batches, "samples", None)
    if told is not None:
        return told(step)
    return range(step * batches.samples_per_step, (step + 1) * batches.samples_per_step)
