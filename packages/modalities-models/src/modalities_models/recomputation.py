"""What a decoder's blocks keep for the backward pass when parts of them are computed again there, by arithmetic alone.

Symbols as in counts.py: D hidden size, H query heads, G key-value heads, F head size, I intermediate size, E experts,
K experts per token.
"""

from __future__ import annotations

from typing import Literal

from modalities_core.errors import ConfigError
from modalities_models.architecture import Architecture
from modalities_models.counts import activations_per_token
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_models.parts import GATED, FeedForwardShape


def kept_per_token(
    architecture: Architecture,
    layer: int,
    recomputation: Literal["none", "blocks", "selective"],
    every: int | None = None,
) -> int:
    """Elements per token that block ``layer`` keeps for its backward pass.

    A block that is recomputed whole keeps its input. Selective recomputation (arXiv:2205.05198) keeps that,
    the output of attention and the results of matrix products. While a block is recomputed, what it keeps without
    recomputation is there once more, of one block at a time.

    Args:
        architecture: of the decoder.
        layer: number of the block, from 0.
        recomputation: of nothing, of whole blocks, or of all but costly operations.
        every: with ``blocks``, every n-th block is recomputed, None being all; with ``selective``, every n-th product
            of a block is computed again all the same, None being none of them.

    Raises:
        ConfigError: selective recomputation of a feed-forward whose products are not known.
    """
    a = architecture
    if recomputation == "none" or (recomputation == "blocks" and (layer + 1) % (every or 1)):
        return activations_per_token(a, layer)
    if recomputation == "blocks":
        return a.hidden_size
    widths = products_per_token(a, layer)
    kept = sum(width for place, width in enumerate(widths, 1) if every is None or place % every)
    return a.hidden_size + a.heads * a.head_size + kept


def products_per_token(architecture: Architecture, layer: int) -> list[int]:
    """Widths of the results of a block's matrix products, in the order in which they are computed.

    Raises:
        ConfigError: the products of the feed-forward are not known.
    """
    a = architecture
    wide, narrow = a.heads * a.head_size, a.key_value_heads * a.head_size
    attention = [wide, narrow, narrow, a.hidden_size]
    shape, mixture = a.feedforward_shape, a.feedforward
    if mixture is None:
        return attention + _dense(shape)
    if not isinstance(mixture, MixtureOfExperts):
        raise ConfigError(f"the matrix products of {type(mixture).__name__} are not known", about=mixture)
    if layer in mixture.dense_layers:
        return attention + _dense(shape)
    experts = [mixture.experts_per_token * width for width in _dense(mixture.expert_shape(shape))]
    shared = [] if mixture.shared_intermediate_size is None else _dense(mixture.shared_shape(shape))
    return attention + [mixture.experts] + experts + shared + [1] * mixture.shared_gate


def _dense(shape: FeedForwardShape) -> list[int]:
    return [shape.intermediate_size] * (2 if shape.activation in GATED else 1) + [shape.hidden_size]
