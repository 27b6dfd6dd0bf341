"""A small model that satisfies Protocol ``Model``, its data and its loss."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modalities_core.interfaces import Batch, LossSum, ParallelPlan

# Sizes that do not divide by 2, 3 or 4, so that shards are uneven.
VOCABULARY, HIDDEN, LAYERS, LENGTH = 61, 14, 3, 9
SAMPLES = 12


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden)
        self.temperature = nn.Parameter(torch.empty(3))  # fewer elements than four ranks

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        query_BTD, key_BTD, value_BTD = self.qkv(self.norm(hidden_BTD)).chunk(3, -1)
        mixed_BTD = F.scaled_dot_product_attention(query_BTD, key_BTD, value_BTD, is_causal=True)
        return hidden_BTD + self.out(F.gelu(mixed_BTD)) * self.temperature.mean()


class TiedHead(nn.Module):
    """Reads the embedding's weight whenever it is called, without owning it."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return F.linear(hidden_BTD, self._embedding[0].weight)


class SmallModel(nn.Module):
    """tie: ``none``, ``read`` (the head reads the embedding) or ``shared`` (one parameter under two names)."""

    def __init__(self, tie: str = "none", hidden: int = HIDDEN, layers: int = LAYERS) -> None:
        super().__init__()
        self.vocab_size, self.sequence_length = VOCABULARY, LENGTH
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head: nn.Module = TiedHead(self.embedding) if tie == "read" else nn.Linear(hidden, VOCABULARY, bias=False)
        if tie == "shared":
            self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.empty(()))
        self.register_buffer("position_D", torch.linspace(0.5, 1.5, hidden, device="cpu"), persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTD = self.embedding(tokens_BT) * self.scale.to(self.embedding.weight.dtype)
        hidden_BTD = hidden_BTD * self.position_D.to(hidden_BTD.dtype)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return self.norm(hidden_BTD)

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(blocks=("blocks.*",), embeddings=("embedding",))

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            yield name, 0.3 * torch.randn(parameter.shape, generator=generator) + ("norm" in name)
        yield "scale", torch.tensor(2.0)

    def flops_per_token(self, sequence_length: int) -> float:
        return 6.0 * sum(parameter.numel() for parameter in self.parameters())


def batch(step: int, first: int, count: int) -> Batch:
    """Samples ``first`` to ``first + count`` of the step's ``SAMPLES``; their weights are anything but even."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)
    weights = torch.rand((SAMPLES, LENGTH), generator=generator)
    weights[:5] *= 0.01
    weights[5] = 0
    rows = slice(first, first + count)
    return Batch(tokens[rows, :-1], tokens[rows, 1:], weights[rows])


def weighted_loss(hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> LossSum:
    """The head once over everything."""
    losses = F.cross_entropy(head(hidden_BTD).float().flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    return LossSum((losses * batch.weights_BT.flatten()).sum(), batch.weights_BT.sum())


def chunked_loss(hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> LossSum:
    """The head once per chunk of the sequence, recomputed in backward, so that logits are never whole."""

    def part(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum()

    parts = zip(hidden_BTD.split(4, 1), batch.targets_BT.split(4, 1), batch.weights_BT.split(4, 1), strict=True)
    total = sum(checkpoint(part, *chunk, use_reentrant=False) for chunk in parts)
    return LossSum(total, batch.weights_BT.sum())


LOSSES = {"weighted": weighted_loss, "chunked": chunked_loss}
