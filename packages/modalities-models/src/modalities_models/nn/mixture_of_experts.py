"""A mixture of experts in place of the dense feed-forward (arXiv:1701.06538, arXiv:2101.03961, arXiv:2401.06066).

A router scores the experts for each token; the token passes through the best k of them, and what they give is added
up, weighted by their scores. No token is dropped and nothing is padded: rows are sorted by expert, each expert
multiplies its own, and they are put back in order. Every step is a gather, so gradients do not depend on the order in
which threads finish.

Loads are balanced without an auxiliary loss (arXiv:2408.15664): a number per expert is added to its score when
experts are chosen, and only then. After each optimizer step it rises for experts that had less than their share of
the tokens and falls for the others.

Shape suffixes: B batch, T tokens, N = B * T, D hidden size, E experts, K experts per token, R = N * K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_core.errors import ConfigError
from modalities_core.interfaces import World
from modalities_models.nn.feedforward import NONLINEARITY, dense, dense_count
from modalities_models.nn.grouped_linear import grouped_linear
from modalities_models.parts import GATED, FeedForwardCount, FeedForwardShape

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """Top-k routing over feed-forwards of their own weights. Router and experts have no biases.

    Args:
        experts: how many there are.
        experts_per_token: how many each token passes through.
        intermediate_size: inner width of one expert.
        shared_intermediate_size: inner width of one more feed-forward that every token passes through (shared experts,
            arXiv:2401.06066: their number times their width); None has none.
        shared_gate: multiply its output by the sigmoid of a learned product with the token (Qwen2-MoE).
        normalize_weights: divide a token's k scores by their sum (Mixtral, Qwen3-MoE).
        score: softmax over all experts, or each expert's own sigmoid (DeepSeek-V3, arXiv:2412.19437).
        balance_rate: how far the choice's bias of an expert moves after each step to even out the loads
            (auxiliary-loss-free balancing, arXiv:2408.15664, where 0.001 is best); 0 has no such bias, as Mixtral and
            Qwen3-MoE.
        dense_layers: numbers, from 0, of blocks that keep the dense feed-forward.

    Raises:
        ConfigError: the numbers are impossible.
    """

    experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    normalize_weights: bool = True
    score: Score = "softmax"
    balance_rate: float = 1e-3
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name in ("experts", "experts_per_token", "intermediate_size", "shared_intermediate_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be positive, not {value}", about=(None, name))
        if self.experts_per_token > self.experts:
            raise ConfigError(
                f"a token cannot pass through {self.experts_per_token} of {self.experts} experts",
                about=(None, "experts_per_token"),
            )
        if self.shared_gate and self.shared_intermediate_size is None:
            raise ConfigError(
                "shared_gate has nothing to gate",
                hint="give shared_intermediate_size, or leave shared_gate out",
                about=(None, "shared_gate"),
            )
        if self.score not in ("softmax", "sigmoid"):
            raise ConfigError(f"score is {self.score!r}; it must be softmax or sigmoid", about=(None, "score"))
        if not 0.0 <= self.balance_rate < 1.0:
            raise ConfigError(
                f"balance_rate is {self.balance_rate}; it must be in [0, 1)", about=(None, "balance_rate")
            )

    def build(self, shape: FeedForwardShape, layer: int) -> nn.Module:
        """The feed-forward of block ``layer``: a mixture, or the dense one where that is asked for."""
        return dense(shape) if layer in self.dense_layers else SparseFeedForward(self, shape)

    def count(self, shape: FeedForwardShape, layer: int) -> FeedForwardCount:
        """What it has and keeps."""
        if layer in self.dense_layers:
            return dense_count(shape)
        expert, outer = dense_count(self.expert_shape(shape)), shape.hidden_size
        always = self.experts * outer
        # The input, the scores, and for each of a token's experts what it is given, makes of it and gives back.
        kept = outer + self.experts + self.experts_per_token * (expert.kept + outer)
        if self.shared_intermediate_size is not None:
            shared = dense_count(self.shared_shape(shape))
            always, kept = always + shared.total, kept + shared.kept - outer
        if self.shared_gate:
            always, kept = always + outer, kept + outer
        active = always + self.experts_per_token * expert.total
        return FeedForwardCount(always + self.experts * expert.total, active, active, kept)

    def check(self, layers: int) -> None:
        """Raise ConfigError if ``dense_layers`` names a block that a model of ``layers`` blocks does not have."""
        for layer in self.dense_layers:
            if not 0 <= layer < layers:
                raise ConfigError(
                    f"dense_layers has {layer}, but the blocks are 0 to {layers - 1}", about=(self, "dense_layers")
                )

    def expert_shape(self, shape: FeedForwardShape) -> FeedForwardShape:
        """Of one expert."""
        return FeedForwardShape(shape.hidden_size, self.intermediate_size, shape.activation, bias=False)

    def shared_shape(self, shape: FeedForwardShape) -> FeedForwardShape:
        """Of the feed-forward that all tokens pass through."""
        assert self.shared_intermediate_size is not None, "only asked where there is one"
        return FeedForwardShape(shape.hidden_size, self.shared_intermediate_size, shape.activation, bias=False)


class Router(nn.Module):
    """Chooses each token's experts.

    Scores are float32 or wider whatever the precision of the model: a choice is all or nothing.
    """

    def __init__(self, mixture: MixtureOfExperts, hidden_size: int) -> None:
        super().__init__()
        self.mixture = mixture
        self.weight = nn.Parameter(torch.empty(mixture.experts, hidden_size))
        self.balance: Tensor | None
        self.load: Tensor
        if mixture.balance_rate:
            self.register_buffer("balance", torch.zeros(mixture.experts))
            # Tokens each expert has had since the last step; zero in every checkpoint, so it is in none.
            self.register_buffer("load", torch.zeros(mixture.experts, dtype=torch.int64), persistent=False)
        else:
            self.balance = None

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) to the weights and numbers of each token's experts: (N, K) float32 or wider, (N, K) int64."""
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        with _without_autocast(hidden_ND.device.type):
            logits_NE = F.linear(hidden_ND.to(dtype), self.weight.to(dtype))
        scores_NE = logits_NE.softmax(-1) if self.mixture.score == "softmax" else logits_NE.sigmoid()
        ranked_NE = scores_NE if self.balance is None else scores_NE + self.balance
        experts_NK = ranked_NE.detach().topk(self.mixture.experts_per_token, dim=-1).indices
        weights_NK = scores_NE.gather(-1, experts_NK)
        if self.mixture.normalize_weights:
            # Sigmoids of all chosen experts can vanish together.
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK, experts_NK


class SparseFeedForward(nn.Module):
    """Router, experts and the shared feed-forward of one block; satisfies ``modalities_core.interfaces.Experts``.

    Args:
        mixture: its numbers.
        shape: hidden size and activation of the decoder.
    """

    def __init__(self, mixture: MixtureOfExperts, shape: FeedForwardShape) -> None:
        super().__init__()
        outer, inner, experts = shape.hidden_size, mixture.intermediate_size, mixture.experts
        self.router = Router(mixture, outer)
        self.gate = nn.Parameter(torch.empty(experts, inner, outer)) if shape.activation in GATED else None
        self.up = nn.Parameter(torch.empty(experts, inner, outer))
        self.down = nn.Parameter(torch.empty(experts, outer, inner))
        self.expert_parameters: tuple[str, ...] = ("up", "down") if self.gate is None else ("gate", "up", "down")
        self.nonlinearity = NONLINEARITY[shape.activation]
        self.shared = None if mixture.shared_intermediate_size is None else dense(mixture.shared_shape(shape))
        self.shared_gate = nn.Linear(outer, 1, bias=False) if mixture.shared_gate else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden_ND = hidden.flatten(0, -2)
        weights_NK, experts_NK = self.router(hidden_ND)
        mixed_ND = self._experts(hidden_ND, weights_NK, experts_NK)
        if self.shared is not None:
            shared_ND = self.shared(hidden_ND)
            if self.shared_gate is not None:
                shared_ND = shared_ND * self.shared_gate(hidden_ND).sigmoid()
            mixed_ND = mixed_ND + shared_ND
        return mixed_ND.view_as(hidden)

    def _experts(self, hidden_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        sorted_R, order_R = experts_NK.flatten().sort(stable=True)
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        # All experts there are, of which this rank may hold some.
        numbers_E = torch.arange(self.router.mixture.experts, device=sorted_R.device)
        ends_E = torch.searchsorted(sorted_R, numbers_E, right=True, out_int32=True)
        if self.training and self.router.balance is not None:
            # A block that something else recomputes counts twice, for all experts alike: above the mean stays above.
            self.router.load.add_(ends_E.diff(prepend=ends_E.new_zeros(1)))
        rows_RD = _Gather.apply(hidden_ND, order_R, place_R, weights_NK.shape[1])
        given_RD = self.apply_experts(rows_RD, ends_E)
        given_NKD = _Gather.apply(given_RD, place_R, order_R, 1).view(*weights_NK.shape, -1)
        return torch.bmm(weights_NK.to(given_RD.dtype)[:, None], given_NKD)[:, 0]

    def apply_experts(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Each row through its expert, (R, D) to (R, D); see ``modalities_core.interfaces.Experts``.

        Args:
            rows_RD: all rows of expert 0, then those of expert 1, and so on.
            ends_E: int32, where the rows of each expert that is here end.
        """
        inner = grouped_linear(rows_RD, self.up, ends_E)
        if self.gate is None:
            inner = self.nonlinearity(inner)
        else:
            inner = self.nonlinearity(grouped_linear(rows_RD, self.gate, ends_E)) * inner
        return grouped_linear(inner, self.down, ends_E)


def _without_autocast(kind: str) -> AbstractContextManager[object]:
    # The meta device has no autocast to turn off; torch 2.11 cannot compile torch.amp.is_autocast_available.
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


class _Gather(torch.autograd.Function):
    """Rows ``index // copies`` of a tensor; ``inverse`` undoes ``index``, a permutation of copies * N numbers.

    The gradient is gathered too: scattering, as autograd would, is slower and on a GPU adds in any order.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return source.index_select(0, index if copies == 1 else index // copies)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None]:  # pyrefly: ignore[bad-override]
        (inverse,) = ctx.saved_tensors
        gathered = grad_outputs[0].index_select(0, inverse)
        if ctx.copies > 1:
            gathered = gathered.unflatten(0, (-1, ctx.copies)).sum(1)
        return gathered, None, None, None


@torch.no_grad()
def balance(routers: Sequence[Router], world: World) -> None:
    """Move every router's bias towards even loads and start counting anew; collective.

    Args:
        routers: with a balance, in the same order on every rank.
        world: over whose ranks the loads are summed; ranks that see the same data count it in equal measure.
    """
    load_LE = world.sum(torch.stack([router.load for router in routers]))
    # Compared in whole numbers: the mean load times the number of experts is the sum.
    direction_LE = (load_LE.sum(-1, keepdim=True) - load_LE * load_LE.shape[-1]).sign()
    for router, direction_E in zip(routers, direction_LE, strict=True):
        assert router.balance is not None, "only routers with a balance count their loads"
        router.balance.add_(direction_E, alpha=router.mixture.balance_rate)
        router.load.zero_()
