"""A model of nobody's that only declares its parallel plan."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities_core.interfaces import Batch, LossSum, ParallelPlan

VOCABULARY, HIDDEN, HEADS, SIZE, LENGTH, SAMPLES = 64, 16, 4, 4, 8, 8


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(HIDDEN, HEADS * SIZE, bias=bias) for _ in range(4))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        projected = (layer(hidden_BTD) for layer in (self.query, self.key, self.value))
        query, key, value = (part.unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in projected)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Wide(nn.Module):
    """A feed-forward and a stack of matrices, as parameters of its own."""

    def __init__(self, inner: int, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, inner, bias=bias), nn.Linear(inner, HIDDEN, bias=bias)
        self.stack_in = nn.Parameter(torch.empty(3, 6, HIDDEN))
        self.stack_out = nn.Parameter(torch.empty(3, HIDDEN, 6))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        stacked = torch.einsum("btd,eid->btei", hidden_BTD, self.stack_in).relu()
        return self.down(F.gelu(self.up(hidden_BTD))) + torch.einsum("btei,edi->btd", stacked, self.stack_out)


class Block(nn.Module):
    def __init__(self, inner: int, bias: bool) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(HIDDEN), Attention(bias)
        self.wide_norm, self.wide = nn.RMSNorm(HIDDEN), Wide(inner, bias)
        self.factor = nn.Parameter(torch.empty(HIDDEN))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD)) * self.factor
        return hidden_BTD + self.wide(self.wide_norm(hidden_BTD))


class Scaled(nn.Module):
    """A head that nobody knows, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(hidden)))


class SplitModel(nn.Module):
    """head: ``linear``, ``tied`` (one parameter under two names), ``biased`` or ``own``."""

    def __init__(
        self, head: str = "linear", inner: int = 20, bias: bool = True, plan: ParallelPlan | None = None
    ) -> None:
        super().__init__()
        self.vocab_size, self.sequence_length = VOCABULARY, LENGTH
        self.embedding, self.places = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=40), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(Block(inner, bias) for _ in range(2))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head: nn.Module = Scaled() if head == "own" else nn.Linear(HIDDEN, VOCABULARY, bias=head == "biased")
        if head == "tied":
            self.head.weight = self.embedding.weight
        self._plan = plan

    def forward(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTD = self.embedding(tokens_BT)
        # For as many places as there are hidden states, as many a model has it.
        hidden_BTD = hidden_BTD + self.places(torch.arange(hidden_BTD.shape[1]))
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return self.norm(hidden_BTD)

    def parallel_plan(self) -> ParallelPlan:
        return self._plan or PLAN

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            yield name, 0.3 * torch.randn(parameter.shape, generator=generator) + ("norm" in name)

    def flops_per_token(self, sequence_length: int) -> float:
        return 6.0 * sum(parameter.numel() for parameter in self.parameters())


PLAN = ParallelPlan(
    blocks=("blocks.*",),
    column=("blocks.*.attention.[qkv]*", "blocks.*.wide.up", "blocks.*.wide.stack_in"),
    row=("blocks.*.attention.output", "blocks.*.wide.down", "blocks.*.wide.stack_out"),
    attention=("blocks.*.attention",),
    head_size=SIZE,
    embeddings=("embedding", "places"),
)


def batch(step: int, rows: slice, length: int = LENGTH) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, length + 1), generator=generator)
    tokens[2] = 40  # the padding
    weights = torch.rand((SAMPLES, length), generator=generator)
    return Batch(tokens[rows, :-1], tokens[rows, 1:], weights[rows])


def weighted_loss(hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> LossSum:
    losses = F.cross_entropy(head(hidden_BTD).float().flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    assert batch.weights_BT is not None
    return LossSum((losses * batch.weights_BT.flatten()).sum(), batch.weights_BT.sum())
