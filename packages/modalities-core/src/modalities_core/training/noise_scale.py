"""The gradient noise scale: up to about which batch size larger batches still save as many steps as they cost.

Method: the simple noise scale tr(S) / |G|^2 of McCandlish, Kaplan, Amodei et al., arXiv:1812.06162, appendix A.1, with
G the true gradient and S the covariance of the gradient of one token. The expected square of a gradient over B tokens
is |G|^2 + tr(S) / B; the gradients of the first micro batch and of the whole step are two equations for the unknowns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Batches, Executor, LossSum, World
from modalities_core.training.norms import sum_dtype

DECAY = 0.99
"""Of the running means, per step: a single step's estimate is mostly noise itself."""


class NoiseScale:
    """Running means of |G|^2 and tr(S), in tokens, on the device; the host never waits but to read them.

    Costs one reduction of a few numbers a step, two passes over the gradients, and under FSDP2 one reduction of the
    gradients more.

    Args:
        executor: calls back after the first micro batch of a step.
        world: the ranks.
        parameters: whose gradients are measured.
    """

    def __init__(self, executor: Executor, world: World, parameters: Sequence[Tensor]) -> None:
        self._executor: Any = executor
        self._world = world
        self._parameters = parameters
        self._first: Tensor | None = None
        self._means = torch.zeros(2, dtype=sum_dtype(world.device), device=world.device)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        """The executor's, measured on the way; collective.

        A step of a single micro batch, as in a batch-size warm-up, or with a gradient that is not finite counts
        for nothing.
        """
        self._executor.after_first = self._after_first
        try:
            sums = self._executor.forward_backward(micro_batches)
        finally:
            self._executor.after_first = None
        if self._first is not None:
            both, self._first = torch.cat([self._first, self._measured(sums)]), None
            found = torch.stack(estimates(*self._world.sum(both)))
            self._means.copy_(torch.where(found.isfinite().all(), self._means.lerp(found, 1 - DECAY), self._means))
        return sums

    def value(self) -> float | None:
        """Tokens, or None as long as the noise hides the gradient; waits for the device."""
        squared, variance = self._means.tolist()
        return variance / squared if squared > 0 and variance > 0 else None

    def state(self) -> list[float]:
        """For a checkpoint; waits for the device."""
        return self._means.tolist()

    def restore(self, state: Sequence[float]) -> None:
        """Go on with the running means of a checkpoint."""
        self._means.copy_(torch.tensor(state, dtype=self._means.dtype))

    def _after_first(self, sums: LossSum) -> None:
        self._first = self._measured(sums)

    def _measured(self, sums: LossSum) -> Tensor:
        """This rank's share of the squared norm of the summed loss's gradient, and its tokens: (2,)."""
        squared = self._world.norm_share(self._parameters, 2.0).to(self._means)
        scaler = getattr(self._executor, "scaler", None)
        if scaler is not None:
            squared = squared / scaler.scale.to(squared).square()
        return torch.stack([squared, sums.tokens.to(squared)])


def estimates(small: Tensor, small_tokens: Tensor, large: Tensor, large_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of |G|^2 and tr(S) without bias, from the gradients of two sums over tokens.

    Args:
        small: squared norm of the gradient summed over few tokens, a scalar.
        small_tokens: how many.
        large: likewise over many, among which the few may be.
        large_tokens: how many.

    Returns:
        |G|^2 and tr(S); not finite where both have the same tokens.
    """
    small, large = small / small_tokens.square(), large / large_tokens.square()
    squared = (large_tokens * large - small_tokens * small) / (large_tokens - small_tokens)
    return squared, (small - large) / (1 / small_tokens - 1 / large_tokens)


def check_noise_scale(executor: Executor, batches: Batches, world: World, about: object) -> None:
    """Refuse runs that have nothing to compare.

    Raises:
        ConfigError: the executor does not tell the gradient of its first micro batch, or a step has only one.
    """
    if not hasattr(executor, "after_first"):
        raise ConfigError(
            f"{type(executor).__name__} does not tell the gradient of its first micro batch, which the gradient noise "
            "scale needs",
            hint="leave noise_scale out, or use the component executor.plain",
            about=(about, "noise_scale"),
        )
    size, ranks = getattr(batches, "micro_batch_size", None), world.data_size
    if size is not None and batches.samples_per_step < 2 * size * ranks:
        smaller = "halve micro_batch_size, or " if size % 2 == 0 else ""
        raise ConfigError(
            f"the gradient noise scale compares micro batches, but {batches.samples_per_step} samples per step are "
            f"one micro batch of {size} on each of {ranks} ranks",
            hint=f"{smaller}set samples_per_step to at least {2 * size * ranks}, or leave noise_scale out",
            about=(about, "noise_scale"),
        )
