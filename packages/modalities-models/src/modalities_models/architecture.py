"""The numbers that say what a decoder is, checked once and kept on the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from modalities_core.errors import ConfigError
from modalities_models.parts import GATED, Activation, FeedForward, FeedForwardShape, RopeScaling

Norm = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "sandwich"]
Positions = Literal["rope", "absolute", "none"]
QueryKeyNorm = Literal["none", "head", "projection"]
AttentionKind = Literal["auto", "sdpa", "flash", "flex"]

VOCAB_MULTIPLE = 1
"""Default of ``vocab_multiple``."""

INTERMEDIATE_MULTIPLE = 64
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
        intermediate_size: inner width of the dense feed-forward.
        norm: RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450).
        norm_eps: added to the variance in every norm.
        norm_placement: ``pre`` norms what enters a sublayer, ``post`` what leaves it, before it is added to the
            residual stream (OLMo 2, arXiv:2501.00656), ``sandwich`` both (Gemma 2, arXiv:2408.00118).
        activation: SwiGLU (arXiv:2002.05202), GeGLU gated by the tanh form of GELU (Gemma), GELU in its tanh form
            (arXiv:1606.08415) as in GPT-2, or squared ReLU (arXiv:2109.08668).
        feedforward: another feed-forward than the dense one, such as a mixture of experts; None is the dense one.
        positions: rotary (arXiv:2104.09864), learned absolute, or none.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how the wavelengths are stretched for longer sequences than ``rope_theta`` was made for.
        bias: biases in projections and LayerNorms; the head never has one.
        query_key_value_bias: biases in the projections to query, key and value; None is as ``bias`` (Qwen2 has these
            alone).
        query_key_norm: RMSNorm of queries and keys before the rotation: over each ``head`` (Qwen3, arXiv:2505.09388)
            or over the whole width of the ``projection`` (OLMo 2).
        attention: the implementation; ``auto`` is the fastest one there is for the device and the mask.
        attention_windows: block l sees the last ``attention_windows[l % len]`` tokens, the present one included;
            None sees all.
        attention_scale: factor on the scores; None is head_size ** -0.5.
        attention_softcap: scores s become cap * tanh(s / cap) (Gemma 2).
        embedding_multiplier: factor on the token embeddings.
        residual_multiplier: factor on what every sublayer adds to the residual stream.
        logit_multiplier: factor on the logits, before their soft cap.
        logit_softcap: logits z become cap * tanh(z / cap) (Gemma 2).
        tied_embeddings: the head uses the embedding's weight (arXiv:1608.05859).
        dropout: probability, on embeddings, attention weights and residual outputs; active in training mode only.
        vocab_multiple: rows of the embedding and of the head are stored rounded up to a multiple of this; logits are
            always ``vocab_size`` wide.

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
    norm_placement: NormPlacement = "pre"
    activation: Activation = "swiglu"
    feedforward: FeedForward | None = None
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    bias: bool = False
    query_key_value_bias: bool | None = None
    query_key_norm: QueryKeyNorm = "none"
    attention: AttentionKind = "auto"
    attention_windows: tuple[int | None, ...] = (None,)
    attention_scale: float | None = None
    attention_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    dropout: float = 0.0
    vocab_multiple: int = VOCAB_MULTIPLE

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention_windows", tuple(self.attention_windows))
        for name in _POSITIVE:
            require_positive(name, getattr(self, name))
        for name in _POSITIVE_OR_NONE:
            if (value := getattr(self, name)) is not None:
                require_positive(name, value)
        for name, kind in _CHOICES.items():
            known = get_args(kind)
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}", about=(None, name)
                )
        if self.feedforward is not None:
            self.feedforward.check(self.layers)
        self._check_attention()
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is a probability in [0, 1), not {self.dropout}", about=(None, "dropout"))

    def _check_attention(self) -> None:
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
        if self.rope_scaling is not None and self.positions != "rope":
            raise ConfigError(
                f"rope_scaling stretches rotary positions, but positions is {self.positions!r}",
                hint="set positions: rope, or leave rope_scaling out",
                about=(None, "rope_scaling"),
            )
        if not self.attention_windows:
            raise ConfigError(
                "attention_windows needs at least one entry", hint="[null] sees all", about=(None, "attention_windows")
            )
        for window in self.attention_windows:
            if window is not None:
                require_positive("attention_windows", window)

    @property
    def has_query_key_value_bias(self) -> bool:
        """Whether the projections to query, key and value have biases."""
        return self.bias if self.query_key_value_bias is None else self.query_key_value_bias

    @property
    def stored_vocab_size(self) -> int:
        """Rows of the embedding and of the head: ``vocab_size`` rounded up to ``vocab_multiple``."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def feedforward_shape(self) -> FeedForwardShape:
        """What the blocks' feed-forwards are built from."""
        return FeedForwardShape(self.hidden_size, self.intermediate_size, self.activation, self.bias)

    def window(self, layer: int) -> int | None:
        """How many tokens block ``layer``, from 0, sees, the present one included; None is all."""
        return self.attention_windows[layer % len(self.attention_windows)]


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
    "embedding_multiplier",
    "residual_multiplier",
    "logit_multiplier",
    "vocab_multiple",
)
_POSITIVE_OR_NONE = ("attention_scale", "attention_softcap", "logit_softcap")
_CHOICES: dict[str, Any] = {
    "norm": Norm,
    "norm_placement": NormPlacement,
    "activation": Activation,
    "positions": Positions,
    "query_key_norm": QueryKeyNorm,
    "attention": AttentionKind,
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
    """Inner width where it is not given: 4 * hidden_size, or 8/3 of it where a gate is, rounded up to 64.

    A gated one has three matrices instead of two; 2/3 of the width keeps the parameters equal (arXiv:2002.05202).
    """
    if activation not in GATED:
        return 4 * hidden_size
    return -(-8 * hidden_size // (3 * INTERMEDIATE_MULTIPLE)) * INTERMEDIATE_MULTIPLE
