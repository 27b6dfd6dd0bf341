"""Progress arithmetic: steps, samples, tokens and epochs, and how they follow from each other.

A *sample* is one sequence of ``sequence_length`` target tokens. A *step* is one optimizer update over
``samples_per_step`` samples, summed over micro batches, accumulation and data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from modalities_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: completed steps and what they consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def advanced(self, samples: int, tokens: int) -> Progress:
        """The progress after one more step."""
        return Progress(self.step + 1, self.samples + samples, self.tokens + tokens)


def samples_per_step(micro_batch_size: int, accumulation: int, data_ranks: int) -> int:
    """Samples in one optimizer step over all data-parallel ranks."""
    return micro_batch_size * accumulation * data_ranks


def accumulation(samples_per_step: int, micro_batch_size: int, data_ranks: int) -> int:
    """Micro batches each rank accumulates per step.

    Raises:
        ConfigError: the global batch is not a whole number of micro batches on every rank.
    """
    share = micro_batch_size * data_ranks
    if samples_per_step % share:
        raise ConfigError(
            f"a global batch of {samples_per_step} samples cannot be split into micro batches of {micro_batch_size} "
            f"on {data_ranks} data-parallel ranks: {micro_batch_size} x {data_ranks} = {share} does not divide it",
            hint=f"the nearest that work: {max(share, samples_per_step // share * share)} and "
            f"{(samples_per_step // share + 1) * share}",
        )
    return samples_per_step // share


def steps_for_tokens(tokens: int, samples_per_step: int, sequence_length: int) -> int:
    """Whole steps that fit into ``tokens`` target tokens."""
    return tokens // (samples_per_step * sequence_length)


def tokens_for_steps(steps: int, samples_per_step: int, sequence_length: int) -> int:
    """Target tokens that ``steps`` steps consume."""
    return steps * samples_per_step * sequence_length


def samples_for_tokens(tokens: int, sequence_length: int) -> int:
    """Whole samples that fit into ``tokens`` target tokens."""
    return tokens // sequence_length


def epochs(samples: int, dataset_samples: int) -> float:
    """How many times ``samples`` goes through a dataset."""
    return samples / dataset_samples


def steps_for_epochs(count: float, dataset_samples: int, samples_per_step: int) -> int:
    """Whole steps in ``count`` passes over a dataset."""
    return int(count * dataset_samples) // samples_per_step
