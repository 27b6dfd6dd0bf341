"""What happens to tokens on their way through a model that is split: they are gathered, summed and exchanged by hooks.

From the first block on each rank holds T / (cp * tp) tokens, cp outermost. A region, attention or feed-forward, is
entered with the T / cp tokens of its context-parallel rank, and left with each tensor-parallel rank's own tokens of
the sum. Inside of attention the projections turn tokens into heads and back (Ulysses, arXiv:2309.14509).

Method: tensor parallelism (Megatron-LM, arXiv:1909.08053) with sequence parallelism (arXiv:2205.05198).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.training.calling import is_for_loss
from modalities_parallel.tensor.exchange import (
    Axis,
    add_up,
    gather,
    gather_copies,
    heads_to_tokens,
    scatter,
    tokens_to_heads,
)


class Tokens:
    """How the ranks share the tokens of the present forward.

    Args:
        tp: the tensor-parallel ranks.
        cp: the context-parallel ranks.
        component: whose argument ``world`` errors are about.
    """

    def __init__(self, tp: Axis, cp: Axis, component: object) -> None:
        self.tp = tp
        self.cp = cp
        self.component = component
        self.split_by_tp = tp.size > 1
        self.split_by_cp = cp.size > 1

    def begin(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Hook before the forward of the model: settle how its tokens are shared.

        Raises:
            ConfigError: their number does not divide, though the gradient is wanted or each rank's own part for a loss.
        """
        given = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
        length = given[0].shape[-1]
        cp, tp = self.cp.size, self.tp.size
        # Whoever calls it for anything but a loss, such as generation, wants the hidden states of all tokens.
        self.split_by_cp = cp > 1 and (torch.is_grad_enabled() or is_for_loss())
        if self.split_by_cp and length % cp:
            raise self._refused(length, "cp", cp)
        own = length // cp if self.split_by_cp else length
        self.split_by_tp = tp > 1 and own % tp == 0
        if tp > 1 and not self.split_by_tp and torch.is_grad_enabled():
            raise self._refused(length, "cp x tp" if cp > 1 else "tp", cp * tp)

    def own(self, hidden: Tensor) -> Tensor:
        """This rank's tokens, along the last dimension but one."""
        if self.split_by_cp:
            hidden = hidden.chunk(self.cp.size, -2)[self.cp.rank]
        if self.split_by_tp:
            hidden = hidden.chunk(self.tp.size, -2)[self.tp.rank]
        return hidden.contiguous()

    def leave(self, summand: Tensor) -> Tensor:
        """From summands of all tokens to this tensor-parallel rank's tokens of their sum."""
        return scatter(summand, -2, self.tp) if self.split_by_tp else add_up(summand, self.tp)

    def _refused(self, length: int, axis: str, parts: int) -> ConfigError:
        return ConfigError(
            f"samples of {length} tokens cannot be cut into the {parts} equal parts of {axis} = {parts}",
            hint=f"take a sequence length that {parts} divides, such as {math.ceil(length / parts) * parts}",
            about=(self.component, "world"),
        )


def enter_blocks(tokens: Tokens) -> Callable[..., Any]:
    """Hook before the first block: what came of the embeddings, for all tokens, is cut.

    Not before, as what else a model makes of them, such as a mask, may be made for as many tokens as they have.
    """

    def hook(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return _first_tensor(arguments, keywords, tokens.own)

    return hook


def enter_region(tokens: Tokens) -> Callable[..., Any]:
    """Hook before a region: its first tensor becomes that of all tensor-parallel ranks."""

    def gathered(hidden: Tensor) -> Tensor:
        return gather(hidden, -2, tokens.tp) if tokens.split_by_tp else hidden

    def hook(region: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return _first_tensor(arguments, keywords, gathered)

    return hook


def leave_region(tokens: Tokens) -> Callable[..., Any]:
    """Hook after a region: what it gives, or the first of that, is summed up and shared out."""

    def hook(region: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tokens.leave(output[0]), *output[1:]
        return tokens.leave(output)

    return hook


def leave_model(tokens: Tokens, whole_head: bool) -> Callable[..., Any]:
    """Hook after the model: hidden states of all tensor-parallel ranks, for the head.

    Args:
        tokens: how they are shared.
        whole_head: every rank computes all of the head, so that gradients come in copies.
    """
    gathering = gather_copies if whole_head else gather

    def hook(model: nn.Module, arguments: Any, output: Any) -> Any:
        stages = getattr(model, "pipeline_stages", None)
        ends = stages is None or stages.ends_model
        return gathering(output, -2, tokens.tp) if tokens.split_by_tp and ends else output

    return hook


def to_heads(tokens: Tokens, head_size: int) -> Callable[..., Any]:
    """Hook after a projection: from all heads of some tokens to some heads of all tokens.

    Fewer heads than ranks, as keys and values may have, are repeated.
    """

    def hook(layer: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        if not tokens.split_by_cp:
            return output
        return _exchanged(output, head_size, tokens.cp)

    return hook


def to_tokens(tokens: Tokens) -> Callable[..., Any]:
    """Hook before the projection of what attention gives: back to all heads of some tokens."""

    def hook(layer: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return (heads_to_tokens(arguments[0], tokens.cp), *arguments[1:]) if tokens.split_by_cp else None

    return hook


def enter_norm(tokens: Tokens, head_size: int) -> Callable[..., Any]:
    """Hook before a norm of all features of a projection: they are gathered, each head once."""

    def hook(norm: nn.Module, arguments: tuple[Any, ...]) -> Any:
        projected = arguments[0]
        if tokens.split_by_cp:
            projected = heads_to_tokens(projected, tokens.cp)
            width = cast(Tensor, norm.weight).shape[-1] // tokens.tp.size
            if (copies := projected.shape[-1] // width) > 1:
                projected = projected.unflatten(-1, (-1, copies, head_size))[..., 0, :].flatten(-2)
        return gather(projected, -1, tokens.tp), *arguments[1:]

    return hook


def leave_norm(tokens: Tokens, head_size: int) -> Callable[..., Any]:
    """Hook after it: this rank's features again."""

    def hook(norm: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        own = output.chunk(tokens.tp.size, -1)[tokens.tp.rank]
        return _exchanged(own, head_size, tokens.cp) if tokens.split_by_cp else own

    return hook


def _exchanged(projected: Tensor, head_size: int, cp: Axis) -> Tensor:
    """Some heads of all tokens; where there are fewer heads than ranks they are repeated."""
    copies = cp.size // math.gcd(projected.shape[-1] // head_size, cp.size)
    if copies > 1:
        heads = projected.unflatten(-1, (-1, 1, head_size))
        projected = heads.expand(*projected.shape[:-1], -1, copies, head_size).flatten(-3)
    return tokens_to_heads(projected, cp)


def _first_tensor(
    arguments: tuple[Any, ...], keywords: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the first tensor among them changed."""
    if arguments:
        return (change(arguments[0]), *arguments[1:]), keywords
    name = next(name for name, value in keywords.items() if isinstance(value, Tensor))
    return arguments, {**keywords, name: change(keywords[name])}
