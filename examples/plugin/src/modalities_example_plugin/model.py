"""A model of one's own: it tells how it may be split, and knows nothing of how that is done.

Shape suffixes: B batch, T tokens, D hidden size, H heads, K head size, V vocabulary.
"""

import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan


class UnitNorm(nn.Module):
    """Divides each token by its root mean square, then multiplies with a weight."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD * (hidden_BTD.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class CosineAttention(nn.Module):
    """Causal attention by the cosine between queries and keys.

    How many heads there are it reads off its projections: on some ranks they give fewer.
    """

    def __init__(self, hidden_size: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        query_BHTK, key_BHTK, value_BHTK = (
            layer(hidden_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores_BHTT = 8 * F.normalize(query_BHTK, dim=-1) @ F.normalize(key_BHTK, dim=-1).mT
        later_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=scores_BHTT.device).triu(1)
        weights_BHTT = scores_BHTT.masked_fill(later_TT, -torch.inf).softmax(-1)
        return self.output((weights_BHTT @ value_BHTK).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(self.up(hidden_BTD).sigmoid())


class Block(nn.Module):
    def __init__(self, hidden_size: int, head_size: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = UnitNorm(hidden_size), CosineAttention(hidden_size, head_size)
        self.feedforward_norm, self.feedforward = UnitNorm(hidden_size), FeedForward(hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD))
        return hidden_BTD + self.feedforward(self.feedforward_norm(hidden_BTD))


class Head(nn.Module):
    """Hidden states to logits that do not grow with the hidden size."""

    # Allowed to be split by ids: each logit depends on its own row of the weight.
    vocabulary_shard = None

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return F.linear(hidden_BTD, self.weight) * hidden_BTD.shape[-1] ** -0.5


class CosineDecoder(nn.Module):
    """A decoder with cosine attention and learned positions; satisfies ``modalities_core.interfaces.Model``.

    Args:
        vocab_size: number of token ids.
        sequence_length: longest input in tokens.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        heads: of each attention.
        seed: of the initial values.
    """

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        hidden_size: int = 64,
        layers: int = 4,
        heads: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if hidden_size % heads:
            raise ConfigError(f"hidden_size {hidden_size} is not a multiple of {heads} heads", about=(self, "heads"))
        self.vocab_size, self.sequence_length, self.seed = vocab_size, sequence_length, seed
        self.head_size = hidden_size // heads
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(sequence_length, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, self.head_size) for _ in range(layers))
        self.norm = UnitNorm(hidden_size)
        self.head = Head(vocab_size, hidden_size)
        self._multiplied = sum(value.numel() for part in (self.blocks, self.head) for value in part.parameters())
        self._attended = layers * hidden_size
        if not self.embedding.weight.is_meta:
            parameters = dict(self.named_parameters())
            with torch.no_grad():
                for name, value in self.initial_values():
                    parameters[name].copy_(value)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        places_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        hidden_BTD = self.embedding(tokens_BT) + self.positions(places_BT)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return self.norm(hidden_BTD)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            blocks=("blocks.*",),
            column=(*(f"blocks.*.attention.{name}" for name in ("query", "key", "value")), "blocks.*.feedforward.up"),
            row=("blocks.*.attention.output", "blocks.*.feedforward.down"),
            attention=("blocks.*.attention",),
            head_size=self.head_size,
            embeddings=("embedding", "positions"),
        )

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        # Each from a seed of its own, so that a rank that holds some of them has the same as one that holds all.
        for name, parameter in self.named_parameters():
            generator = torch.Generator("cpu").manual_seed(self.seed + zlib.crc32(name.encode()))
            if name.endswith("norm.weight"):
                yield name, torch.ones(parameter.shape, device="cpu")
            elif name.endswith("bias"):
                yield name, torch.zeros(parameter.shape, device="cpu")
            else:
                drawn = torch.randn(parameter.shape, generator=generator, device="cpu")
                yield name, drawn if name == "head.weight" else drawn * parameter.shape[-1] ** -0.5

    def flops_per_token(self, sequence_length: int) -> float:
        return 6.0 * self._multiplied + 12.0 * self._attended * sequence_length
