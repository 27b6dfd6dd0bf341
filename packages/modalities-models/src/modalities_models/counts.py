"""What a decoder of given numbers has and costs, by arithmetic alone: parameters, FLOPs and memory.

Symbols: D hidden size, L layers, H query heads, G key-value heads, F head size, V vocabulary size, S sequence length.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from modalities_models.architecture import Architecture
from modalities_models.nn.feedforward import dense_count
from modalities_models.parts import FeedForwardCount

Convention = Literal["full", "causal"]
BYTES = {"fp32": 4, "bf16": 2}


class ParameterCount(NamedTuple):
    """Numbers of parameters, tied ones counted once, padding of the vocabulary left out.

    total: all.
    embedding: of the token and position embeddings; a tied head is among them.
    active: that take part in the computation of one token: all but the experts it does not pass through.
    matmul: active weights that multiply activations: projections, experts, routers and the head, tied or not; without
        the embedding lookup, norms and biases.
    """

    total: int
    embedding: int
    active: int
    matmul: int


class Memory(NamedTuple):
    """Bytes on one device.

    weights: float32.
    gradients: float32.
    optimizer: the two float32 moments of Adam.
    activations: what the blocks keep for the backward pass.
    logits: the float32 log-probabilities and their gradient, and the gradient in the precision of the computation
        where that is another.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def parameter_count(architecture: Architecture) -> ParameterCount:
    """How many parameters the decoder has."""
    a = architecture
    feedforwards = [_feedforward(a, layer) for layer in range(a.layers)]
    embedding = a.vocab_size * a.hidden_size + (a.sequence_length * a.hidden_size if a.positions == "absolute" else 0)
    head = a.vocab_size * a.hidden_size
    around = a.layers * (_attention_matrices(a) + _attention_vectors(a)) + _norms(a)
    around += embedding + (0 if a.tied_embeddings else head)
    return ParameterCount(
        total=around + sum(count.total for count in feedforwards),
        embedding=embedding,
        active=around + sum(count.active for count in feedforwards),
        matmul=a.layers * _attention_matrices(a) + head + sum(count.matmul for count in feedforwards),
    )


def flops_per_token(architecture: Architecture, sequence_length: int, convention: Convention = "full") -> float:
    """Training FLOPs per token, forward and backward: 6 per matmul parameter and 12 * H * F * keys per block.

    Args:
        architecture: of the decoder.
        sequence_length: S, tokens of a sample.
        convention: how many keys a query meets. ``full`` is S, causality not discounted (PaLM, arXiv:2204.02311
            appendix B; torchtitan, OLMo-core), or the block's window where that is smaller. ``causal`` is the mean
            over the sequence, S / 2 (Megatron-LM), and w * (1 - w / 2S) with a window w <= S.
    """
    a = architecture
    keys = sum(_keys(a.window(layer), sequence_length, convention) for layer in range(a.layers))
    return 6.0 * parameter_count(a).matmul + 12.0 * a.heads * a.head_size * keys


def memory(
    architecture: Architecture,
    micro_batch_size: int,
    sequence_length: int,
    precision: Literal["fp32", "bf16"] = "bf16",
    shards: int = 1,
    chunk_tokens: int | None = None,
) -> Memory:
    """What training with AdamW takes at the least: no fragmentation, no communication buffers, no framework.

    Args:
        architecture: of the decoder.
        micro_batch_size: samples of one forward and backward.
        sequence_length: tokens of a sample.
        precision: of activations; weights, gradients and optimizer are float32.
        shards: devices that share weights, gradients and optimizer.
        chunk_tokens: tokens whose logits exist at a time; None is all of the micro batch.
    """
    a = architecture
    width, tokens = BYTES[precision], micro_batch_size * sequence_length
    rows = a.stored_vocab_size - a.vocab_size
    stored = parameter_count(a).total + rows * a.hidden_size * (1 if a.tied_embeddings else 2)
    weights = -(-4 * stored // shards)
    per_token = sum(activations_per_token(a, layer) for layer in range(a.layers))
    at_once = tokens if chunk_tokens is None else min(chunk_tokens, tokens)
    per_logit = 8 if precision == "fp32" else 8 + width
    return Memory(weights, weights, 2 * weights, tokens * width * per_token, at_once * a.vocab_size * per_logit)


def activations_per_token(architecture: Architecture, layer: int) -> int:
    """Elements per token that block ``layer`` keeps for its backward pass, nothing recomputed.

    Attention keeps its input, queries, keys, values and output and no scores, as fused implementations do; a norm
    keeps its input; what a matrix multiplies is kept once, however many multiply it. Dropout's masks and numbers per
    head, such as the log of a softmax's sum, are left out.
    """
    a = architecture
    wide, narrow = a.heads * a.head_size, a.key_value_heads * a.head_size
    attention = a.hidden_size + 2 * wide + 2 * narrow
    if a.query_key_norm != "none":
        attention += wide + narrow
    norms = (4 if a.norm_placement == "sandwich" else 2) * a.hidden_size
    return attention + norms + _feedforward(a, layer).kept


def _feedforward(architecture: Architecture, layer: int) -> FeedForwardCount:
    shape = architecture.feedforward_shape
    return dense_count(shape) if architecture.feedforward is None else architecture.feedforward.count(shape, layer)


def _attention_matrices(architecture: Architecture) -> int:
    a = architecture
    return 2 * a.hidden_size * a.head_size * (a.heads + a.key_value_heads)


def _attention_vectors(architecture: Architecture) -> int:
    """Biases and query-key norms."""
    a = architecture
    wide, narrow = a.heads * a.head_size, a.key_value_heads * a.head_size
    biases = (wide + 2 * narrow if a.has_query_key_value_bias else 0) + (a.hidden_size if a.bias else 0)
    return biases + {"none": 0, "head": 2 * a.head_size, "projection": wide + narrow}[a.query_key_norm]


def _norms(architecture: Architecture) -> int:
    """Of all blocks and the final one."""
    a = architecture
    size = a.hidden_size * (2 if a.norm == "layer" and a.bias else 1)
    return size * (a.layers * (4 if a.norm_placement == "sandwich" else 2) + 1)


def _keys(window: int | None, sequence_length: int, convention: Convention) -> float:
    seen = sequence_length if window is None else min(window, sequence_length)
    return float(seen) if convention == "full" else seen * (1 - seen / (2 * sequence_length))
