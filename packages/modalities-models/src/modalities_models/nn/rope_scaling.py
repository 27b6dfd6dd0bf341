"""How rotary wavelengths are stretched for sequences longer than they were made for.

Each scaling gives the same float32 numbers, operation for operation, as ``ROPE_INIT_FUNCTIONS`` of Hugging Face's
``modeling_rope_utils``, so that an exported model turns its heads by the same angles.

Shape suffix: P pairs of elements of a head, head_size / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modalities_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Linear:
    """Positions are divided by a factor (arXiv:2306.15595).

    Args:
        factor: by how much the sequences become longer.

    Raises:
        ConfigError: the factor is below 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "factor", "at least 1", self.factor)

    def frequencies(
        self, head_size: int, theta: float, sequence_length: int, device: torch.device | None = None
    ) -> tuple[Tensor, float]:
        """Radians per position, (head_size / 2,) float32, and 1."""
        return plain_frequencies(head_size, theta, device) / self.factor, 1.0


@dataclass(frozen=True, slots=True)
class Ntk:
    """The base grows with the sequence length, so that short wavelengths stay and long ones stretch (NTK-aware).

    With L the model's ``sequence_length`` and L0 the original one the base becomes
    theta * (factor * L / L0 - factor + 1)^(F / (F - 2)): with a factor of 1 the static form for L / L0 times the
    length, with others what Hugging Face's ``dynamic`` has at an input of L tokens. It is the same for inputs of any
    length, so that cached keys stay valid. At L up to L0 nothing changes.

    Args:
        original_length: the sequence length the base was made for.
        factor: how fast the base grows beyond it.

    Raises:
        ConfigError: the length is not positive, or the factor is below 1.
    """

    original_length: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        _require(self.original_length > 0, "original_length", "positive", self.original_length)
        _require(self.factor >= 1, "factor", "at least 1", self.factor)

    def frequencies(
        self, head_size: int, theta: float, sequence_length: int, device: torch.device | None = None
    ) -> tuple[Tensor, float]:
        """Radians per position, (head_size / 2,) float32, and 1."""
        longer = max(sequence_length, self.original_length) / self.original_length
        _require(head_size > 2, "head_size", "more than 2 with NTK scaling", head_size)
        grown = theta * (self.factor * longer - (self.factor - 1)) ** (head_size / (head_size - 2))
        return plain_frequencies(head_size, grown, device), 1.0


@dataclass(frozen=True, slots=True)
class Yarn:
    """Long wavelengths are stretched, short ones stay, those between are blended (YaRN, arXiv:2309.00071).

    Args:
        factor: by how much the sequences become longer.
        original_length: the sequence length the wavelengths were made for.
        attention_factor: factor on cosines and sines; None is 0.1 * ln(factor) + 1 as in the paper.
        beta_fast: pairs that turn more often than this within the original length stay.
        beta_slow: pairs that turn less often than this are stretched in full.
        truncate: round the limits between them outwards to whole pairs.

    Raises:
        ConfigError: the numbers are impossible.
    """

    factor: float
    original_length: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "factor", "at least 1", self.factor)
        _require(self.original_length > 0, "original_length", "positive", self.original_length)
        given = self.attention_factor
        _require(given is None or given > 0, "attention_factor", "positive", given)
        _require(self.beta_slow > 0, "beta_slow", "positive", self.beta_slow)
        _require(self.beta_fast >= self.beta_slow, "beta_fast", "at least beta_slow", self.beta_fast)

    def frequencies(
        self, head_size: int, theta: float, sequence_length: int, device: torch.device | None = None
    ) -> tuple[Tensor, float]:
        """Radians per position, (head_size / 2,) float32, and the attention factor."""
        wavelengths_P = _powers(head_size, theta, device)
        first, last = (self._pair(turns, head_size, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_size - 1)
        width = last - first or 0.001
        pairs_P = torch.arange(head_size // 2, dtype=torch.float32, device=device)
        kept_P = 1 - ((pairs_P - first) / width).clamp(0, 1)
        stretched_P, same_P = 1.0 / (self.factor * wavelengths_P), 1.0 / wavelengths_P
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(self.factor) + 1.0
        return stretched_P * (1 - kept_P) + same_P * kept_P, factor

    def _pair(self, turns: float, head_size: int, theta: float) -> float:
        """The pair, as a fraction, that makes ``turns`` whole turns within the original length."""
        return head_size * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True, slots=True)
class Llama3:
    """Wavelengths are stretched where they are long, by parts between two limits (Llama 3.1, arXiv:2407.21783).

    Args:
        factor: by how much long wavelengths are stretched.
        original_length: the sequence length the wavelengths were made for.
        low_frequency_factor: wavelengths above original_length divided by this are stretched in full.
        high_frequency_factor: wavelengths below original_length divided by this stay.

    Raises:
        ConfigError: the numbers are impossible.
    """

    factor: float
    original_length: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "factor", "at least 1", self.factor)
        _require(self.original_length > 0, "original_length", "positive", self.original_length)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        _require(low > 0, "low_frequency_factor", "positive", low)
        _require(high > low, "high_frequency_factor", "above low_frequency_factor", high)

    def frequencies(
        self, head_size: int, theta: float, sequence_length: int, device: torch.device | None = None
    ) -> tuple[Tensor, float]:
        """Radians per position, (head_size / 2,) float32, and 1."""
        same_P = plain_frequencies(head_size, theta, device)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        wavelengths_P = 2 * math.pi / same_P
        long_P, short_P = wavelengths_P > self.original_length / low, wavelengths_P < self.original_length / high
        kept_P = (self.original_length / wavelengths_P - low) / (high - low)
        blended_P = (1 - kept_P) * same_P / self.factor + kept_P * same_P
        scaled_P = torch.where(long_P, same_P / self.factor, torch.where(short_P, same_P, blended_P))
        return scaled_P, 1.0


def plain_frequencies(head_size: int, theta: float, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/F) radians per position, (head_size / 2,) float32."""
    return 1.0 / _powers(head_size, theta, device)


def _powers(head_size: int, theta: float, device: torch.device | None) -> Tensor:
    return theta ** (torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size)


def _require(right: bool, name: str, what: str, value: float | None) -> None:
    if not right:
        raise ConfigError(f"{name} must be {what}, not {value}", about=(None, name))
