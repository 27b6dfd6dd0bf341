"""The numbers that say what a decoder is, checked once and kept on the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modalities_core.errors import ConfigError

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu"]
Positions = Literal["rope", "absolute", "none"]

SWIGLU_MULTIPLE = 64
"""Intermediate sizes that are derived are rounded up to this, so that matrix units are filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder's shape, every number resolved; sizes are counts of elements.

    Args:
        vocab_size: number of token ids.
        sequence_length: longest input in tokens.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        heads: query heads per block.
        key_value_heads: key and value heads per block; fewer than ``heads`` is grouped-query attention
            (arXiv:2305.13245).
        head_size: width of one head.
        intermediate_size: inner width of the feed-forward.
        norm: RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450).
        norm_eps: added to the variance in every norm.
        activation: SwiGLU (arXiv:2002.05202), or GELU in its tanh form (arXiv:1606.08415) as in GPT-2.
        positions: rotary (arXiv:2104.09864), learned absolute, or none.
        rope_theta: base of the rotary wavelengths.
        bias: biases in projections and LayerNorms; the head never has one.
        query_key_norm: RMSNorm over each query and key head before the rotation (Qwen3, arXiv:2505.09388).
        tied_embeddings: the head uses the embedding's weight (arXiv:1608.05859).
        dropout: probability, on embeddings, attention weights and residual outputs; active in training mode only.

    Raises:
        ConfigError: the numbers are impossible.
    """

    vocab_size: int
    sequence_length: int
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate_size: int
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    activation: Activation = "swiglu"
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    bias: bool = False
    query_key_norm: bool = False
    tied_embeddings: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            require_positive(name, getattr(self, name))
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}", about=(None, name)
                )
        if self.heads % self.key_value_heads:
            raise ConfigError(
                f"key_value_heads {self.key_value_heads} does not divide heads {self.heads} "
                f"(remainder {self.heads % self.key_value_heads}); each serves equally many query heads",
                hint=f"divisors of {self.heads}: {', '.join(map(str, divisors(self.heads)))}",
                about=(None, "key_value_heads"),
            )
        if self.positions == "rope" and self.head_size % 2:
            raise ConfigError(
                f"rotary positions turn pairs of elements, so head_size must be even, not {self.head_size}",
                hint="head_size defaults to hidden_size / heads",
                about=(None, "head_size"),
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is a probability in [0, 1), not {self.dropout}", about=(None, "dropout"))

    @property
    def matmul_parameters(self) -> int:
        """Weights that multiply activations: projections and head, without input embeddings, norms and biases."""
        attention = 2 * self.hidden_size * self.head_size * (self.heads + self.key_value_heads)
        matrices = 3 if self.activation == "swiglu" else 2
        feedforward = matrices * self.hidden_size * self.intermediate_size
        return self.layers * (attention + feedforward) + self.vocab_size * self.hidden_size

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token at ``sequence_length``, forward and backward.

        6 per matmul parameter plus 12 * layers * heads * head_size * sequence_length for attention, causality not
        discounted (PaLM, arXiv:2204.02311 appendix B). A tied head counts once; the embedding lookup does not.
        """
        attention = 12 * self.layers * self.heads * self.head_size * sequence_length
        return float(6 * self.matmul_parameters + attention)


_POSITIVE = (
    "vocab_size",
    "sequence_length",
    "hidden_size",
    "layers",
    "heads",
    "key_value_heads",
    "head_size",
    "intermediate_size",
    "norm_eps",
    "rope_theta",
)
_CHOICES = {
    "norm": ("rms", "layer"),
    "activation": ("swiglu", "gelu"),
    "positions": ("rope", "absolute", "none"),
}


def require_positive(name: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is above zero."""
    if not value > 0:
        raise ConfigError(f"{name} must be positive, not {value}", about=(None, name))


def divisors(number: int) -> list[int]:
    """All divisors of ``number`` in rising order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def derived_head_size(hidden_size: int, heads: int) -> int:
    """Width of one head where it is not given: hidden_size / heads.

    Raises:
        ConfigError: heads does not divide hidden_size.
    """
    require_positive("hidden_size", hidden_size)
    require_positive("heads", heads)
    if hidden_size % heads:
        near = hidden_size // heads * heads
        sizes = [size for size in (near, near + heads) if size]
        raise ConfigError(
            f"heads {heads} does not divide hidden_size {hidden_size} (remainder {hidden_size % heads})",
            hint=f"take hidden_size {' or '.join(map(str, sizes))}, or set head_size yourself",
            about=(None, "heads"),
        )
    return hidden_size // heads


def derived_intermediate_size(hidden_size: int, activation: str) -> int:
    """Inner width where it is not given: 4 * hidden_size for GELU, 8/3 of it for SwiGLU, rounded up to 64.

    SwiGLU has three matrices instead of two; 2/3 of the width keeps the parameters equal (arXiv:2002.05202).
    """
    if activation == "gelu":
        return 4 * hidden_size
    return -(-8 * hidden_size // (3 * SWIGLU_MULTIPLE)) * SWIGLU_MULTIPLE
