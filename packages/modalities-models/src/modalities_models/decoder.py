"""A decoder: tokens to hidden states, and the head that turns them into logits.

Parameter names (N counts from 0):
    embedding.weight (V, D); positions.weight (longest T, D) for absolute positions
    blocks.N.attention_norm unless the norms stand after, blocks.N.attention_output_norm unless they stand before
    blocks.N.attention.{query,key,value,output}[, query_norm, key_norm]
    blocks.N.feedforward_norm, blocks.N.feedforward_output_norm likewise
    blocks.N.feedforward.{gate,up,down} or {up,down}
    of a mixture of E experts, where I is an expert's intermediate size: blocks.N.feedforward.router.weight (E, D),
        .gate and .up (E, I, D), .down (E, D, I)[, .shared.{gate,up,down}, .shared_gate.weight (1, D)], and the buffer
        .router.balance (E,)
    norm; head.weight (V, D) unless tied
V is rounded up to ``vocab_multiple``. Matrices are (out, in) as in ``nn.Linear``; nn/attention.py says how heads lie
in them.

Shape suffixes: B batch, T tokens, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan, World
from modalities_models.architecture import Architecture
from modalities_models.counts import flops_per_token
from modalities_models.decoder_plan import decoder_plan
from modalities_models.head import Head, LinearHead, TiedHead
from modalities_models.initialization import GivenWeights, Initialization, Scaled, initial_value
from modalities_models.nn.attention_implementations import prepare
from modalities_models.nn.block import Block
from modalities_models.nn.caches import KeyValueCache
from modalities_models.nn.masks import causal, positions
from modalities_models.nn.mixture_of_experts import Router, balance
from modalities_models.nn.norms import norm
from modalities_models.nn.rope import rotation
from modalities_models.parts import FeedForward, RopeScaling
from modalities_models.presets import resolve
from modalities_models.roles import roles


class Decoder(nn.Module):
    """A decoder of any ``Architecture``; satisfies ``modalities_core.interfaces.Model``.

    Inside ``torch.device("meta")`` nothing is initialised; anywhere else the constructor fills all parameters from
    ``initial_values``. Parameters have torch's default dtype. There are no buffers but those of routers that balance
    the loads of their experts: ``balance``, float32 and kept in checkpoints, and ``load``, a count that is zero
    between steps.

    Args:
        architecture: all its numbers.
        initialization: how weight matrices are filled, or the values of them all.
        seed: of the initial values.
    """

    def __init__(
        self, architecture: Architecture, initialization: Initialization | GivenWeights, seed: int = 0
    ) -> None:
        super().__init__()
        self.architecture = a = architecture
        if isinstance(initialization, GivenWeights):
            initialization.check(a)
        self.vocab_size = a.vocab_size
        self.sequence_length = a.sequence_length
        self.initialization = initialization
        self.seed = seed
        device = torch.get_default_device()
        # Always built without storage, so that nothing is filled twice and no value can live outside a parameter.
        with torch.device("meta"):
            self.embedding = _embedding(a.stored_vocab_size, a.hidden_size)
            absolute = a.positions == "absolute"
            self.positions = _embedding(a.sequence_length, a.hidden_size) if absolute else None
            self.blocks = nn.ModuleList([Block(a, layer) for layer in range(a.layers)])
            self.norm = norm(a.norm, a.hidden_size, a.norm_eps, a.bias)
            self.head: Head = _head(a, self.embedding)
        # Noted now, because wrappers around modules may rename or shard parameters later.
        self._roles = roles(self)
        self._balanced = tuple(part for part in self.modules() if isinstance(part, Router) and part.balance is not None)
        self._buffer_shapes = {name: tuple(buffer.shape) for name, buffer in self.named_buffers()}
        if device.type != "meta":
            self.to_empty(device=device)
            self._initialise()

    def forward(
        self,
        tokens_BT: Tensor,
        caches: Sequence[KeyValueCache] | None = None,
        segments_BT: Tensor | None = None,
        padding_B: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) int64 to hidden states (B, T, D) after the final norm.

        Args:
            tokens_BT: the ids; with caches, those that follow what the caches hold.
            caches: one per block, from ``new_caches``; extended by these tokens.
            segments_BT: (B, T) integers, the number of each token's document within its sample; tokens then see
                only their own document, and positions count from its start. Not together with caches.
            padding_B: (B,) int64, how many leading tokens of each row, those in the caches included, are padding:
                no other token sees them, and positions count from the first after them. So prompts of different
                lengths are read together; the same counts are given with every piece of the text.

        Raises:
            ConfigError: the input is longer than the model's sequence length, or gradients are wanted and the named
                implementation of attention cannot be used.
        """
        start = caches[0].length if caches else 0
        length = start + tokens_BT.shape[1]
        if length > self.sequence_length:
            raise ConfigError(
                f"the model takes at most {self.sequence_length} tokens, not {length}",
                hint=f"shorten the data's sequences, or build the model with sequence_length {length} or more",
                about=(self, "sequence_length"),
            )
        assert segments_BT is None or (caches is None and padding_B is None), "documents are packed without either"
        mask, places = (
            causal(tokens_BT, start, segments_BT, padding_B),
            positions(tokens_BT, start, segments_BT, padding_B),
        )
        a = self.architecture
        hidden_BTD = self.embedding(tokens_BT)
        if a.embedding_multiplier != 1.0:
            hidden_BTD = hidden_BTD * a.embedding_multiplier
        if self.positions is not None:
            hidden_BTD = hidden_BTD + self.positions(places)
        if a.dropout and self.training:
            hidden_BTD = F.dropout(hidden_BTD, a.dropout)
        prepare(mask, a, hidden_BTD, self)
        turned = None
        if a.positions == "rope":
            turned = rotation(places, a.head_size, a.rope_theta, a.rope_scaling, a.sequence_length)
        for index, block in enumerate(self.blocks):
            hidden_BTD = block(hidden_BTD, turned, mask, caches[index] if caches else None)
        return self.norm(hidden_BTD)

    def new_caches(self, capacity: int | None = None) -> list[KeyValueCache]:
        """Empty caches for ``forward``, one per block.

        Args:
            capacity: tokens they hold; by default the model's sequence length.
        """
        a = self.architecture
        return [KeyValueCache(capacity or self.sequence_length, a.window(layer)) for layer in range(a.layers)]

    def parallel_plan(self) -> ParallelPlan:
        """Blocks, and how heads, intermediate sizes and the rows of tables and head are split."""
        return decoder_plan(self)

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's and buffer's name and whole initial value, float32 on the CPU; the same on every rank."""
        given: set[str] = set()
        for name, value in self._parameter_values():
            given.add(name)
            yield name, value
        for name, shape in self._buffer_shapes.items():
            if name not in given:
                yield name, torch.zeros(shape, dtype=torch.float32, device="cpu")

    def _parameter_values(self) -> Iterator[tuple[str, Tensor]]:
        a, initialization = self.architecture, self.initialization
        if isinstance(initialization, GivenWeights):
            yield from initialization.values(a)
            return
        for name, (shape, role) in self._roles.items():
            if role.kind in ("embedding", "head"):
                # Padding is zero, and what is drawn for the other rows does not depend on it.
                drawn = initial_value(name, (a.vocab_size, a.hidden_size), role, initialization, self.seed)
                yield name, F.pad(drawn, (0, 0, 0, shape[0] - a.vocab_size))
            else:
                yield name, initial_value(name, shape, role, initialization, self.seed)

    def finish_step(self, world: World) -> None:
        """Even out the experts' loads after an optimizer step; see ``modalities_core.interfaces.Model``."""
        here = [router for router in self._balanced if not router.load.is_meta]  # not those of a pipeline's other ranks
        if here:
            balance(here, world)

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token, forward and backward (PaLM convention, arXiv:2204.02311 appendix B)."""
        return flops_per_token(self.architecture, sequence_length)

    def causal_flops_per_token(self, sequence_length: int) -> float:
        """The same with the share of the attention that causality leaves over (Megatron-LM's convention)."""
        return flops_per_token(self.architecture, sequence_length, "causal")

    @property
    def parameter_count(self) -> int:
        """Elements in all parameters, each counted once, whatever the sharding."""
        return sum(torch.Size(shape).numel() for shape, _ in self._roles.values())

    @torch.no_grad()
    def _initialise(self) -> None:
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, values in self.initial_values():
            tensors[name].copy_(values)


def _embedding(rows: int, hidden_size: int) -> nn.Embedding:
    # torch's own initialisation on the meta device would load its compiler, which takes a second.
    return nn.Embedding.from_pretrained(torch.empty(rows, hidden_size), freeze=False)


def _head(architecture: Architecture, embedding: nn.Embedding) -> Head:
    a = architecture
    if a.tied_embeddings:
        return TiedHead(embedding, a.vocab_size, a.logit_multiplier, a.logit_softcap)
    return LinearHead(a.stored_vocab_size, a.hidden_size, a.vocab_size, a.logit_multiplier, a.logit_softcap)


def decoder(
    preset: str | None = None,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
    hidden_size: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    key_value_heads: int | None = None,
    head_size: int | None = None,
    intermediate_size: int | None = None,
    norm: Literal["rms", "layer"] | None = None,
    norm_eps: float | None = None,
    norm_placement: Literal["pre", "post", "sandwich"] | None = None,
    activation: Literal["swiglu", "geglu", "gelu", "relu_squared"] | None = None,
    feedforward: FeedForward | None = None,
    positions: Literal["rope", "absolute", "none"] | None = None,
    rope_theta: float | None = None,
    rope_scaling: RopeScaling | None = None,
    bias: bool | None = None,
    query_key_value_bias: bool | None = None,
    query_key_norm: Literal["none", "head", "projection"] | None = None,
    attention: Literal["auto", "sdpa", "flash", "flex"] | None = None,
    attention_windows: tuple[int | None, ...] | None = None,
    attention_scale: float | None = None,
    attention_softcap: float | None = None,
    embedding_multiplier: float | None = None,
    residual_multiplier: float | None = None,
    logit_multiplier: float | None = None,
    logit_softcap: float | None = None,
    tied_embeddings: bool | None = None,
    dropout: float | None = None,
    vocab_multiple: int | None = None,
    initialization: Initialization | GivenWeights | None = None,
    seed: int = 0,
) -> Decoder:
    """A decoder of a named size, of given numbers, or of a named size with some numbers changed.

    Args:
        preset: a name from ``modalities_models.presets`` that gives the default of every argument below; without one
            vocab_size, sequence_length, hidden_size, layers and heads are needed.
        vocab_size: number of token ids.
        sequence_length: longest input in tokens.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        heads: query heads per block.
        key_value_heads: key and value heads per block, a divisor of heads (grouped-query attention,
            arXiv:2305.13245); default heads.
        head_size: width of one head; default hidden_size / heads.
        intermediate_size: inner width of the dense feed-forward; default 4 * hidden_size, and 8/3 of hidden_size
            rounded up to 64 for swiglu and geglu.
        norm: RMSNorm (default) or LayerNorm.
        norm_eps: added to the variance in every norm; default 1e-5.
        norm_placement: pre (the default) norms what enters a sublayer, post what leaves it (OLMo 2), sandwich both
            (Gemma 2).
        activation: of the feed-forward; swiglu by default; geglu and gelu take GELU in its tanh form, as Gemma and
            GPT-2; relu_squared is the square of ReLU.
        feedforward: instead of the dense feed-forward, such as ``feedforward.mixture_of_experts``.
        positions: rope (rotary, the default), absolute (learned), or none.
        rope_theta: base of the rotary wavelengths; default 10000.
        rope_scaling: stretches the rotary wavelengths for longer sequences.
        bias: biases in projections and LayerNorms; the head never has one; default false.
        query_key_value_bias: biases in the projections to query, key and value; default as bias.
        query_key_norm: RMSNorm of queries and keys before the rotation: over each head (Qwen3), over the whole
            projection (OLMo 2), or none, the default.
        attention: the implementation; auto (the default) takes the fastest there is.
        attention_windows: how many tokens, the present one included, the blocks see, in turn; null is all. Default
            [null].
        attention_scale: factor on the attention scores; default head_size ** -0.5.
        attention_softcap: scores s become cap * tanh(s / cap); default none.
        embedding_multiplier: factor on the token embeddings; default 1.
        residual_multiplier: factor on what every sublayer adds to the residual stream; default 1.
        logit_multiplier: factor on the logits, before their soft cap; default 1.
        logit_softcap: logits z become cap * tanh(z / cap); default none.
        tied_embeddings: the head uses the embedding's weight; default false.
        dropout: probability, on embeddings, attention weights and residual outputs, in training only; default 0.
        vocab_multiple: rows of embedding and head are stored rounded up to a multiple of this; logits and exports
            have vocab_size.
        initialization: how weights are filled, or where they come from (``initialization.pretrained``); default
            ``initialization.scaled`` with std 0.02.
        seed: of the initial values.

    Raises:
        ConfigError: the preset is unknown, a needed number is missing, or the numbers are impossible.
    """
    given = dict(locals())
    overrides = {field.name: given[field.name] for field in fields(Architecture)}
    return Decoder(resolve(preset, overrides), initialization or Scaled(), seed)
