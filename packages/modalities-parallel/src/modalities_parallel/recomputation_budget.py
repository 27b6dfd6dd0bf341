"""As many recomputed blocks as a budget of memory asks for, decided by what the blocks keep."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_parallel.recomputed import buffers_aside, recomputable, recompute

log = logging.getLogger("modalities")


class Kept(NamedTuple):
    """Bytes that a block keeps for its backward pass: ``whole`` without recomputation, ``recomputed`` with it."""

    whole: int
    recomputed: int


def budget(model: Model, share: float) -> Model:
    """Recompute as few blocks as keep the activations within a share of their memory.

    In the first micro batch each block runs once more, alone, to see what it keeps, and all are recomputed; from then
    on only the first ones are, so many as needed: the last are the first that backward needs, and their memory is
    free again when the others are recomputed. Losses and gradients stay the same, bit for bit on one device. Put it
    inside of parallel.fsdp2, as the model that it shards.

    Method: gradient checkpointing (arXiv:1604.06174).

    Args:
        model: changed in place; its parallel plan names the blocks.
        share: of what all blocks would keep for the backward pass, from 0 (recompute all) to 1 (recompute none).

    Raises:
        ConfigError: the plan names no blocks, they are recomputed already, or ``share`` is not in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"share is {share}; it is from 0 to 1", about=(budget, "share"))
    _Measuring(recomputable(model, budget), share)
    return model


def chosen(kept: Sequence[Kept], share: float) -> list[bool]:
    """Which blocks to recompute so that at most ``share`` of the bytes are kept, or as little as can be.

    Args:
        kept: by each block, in the order of the forward.
        share: of what all keep without recomputation.
    """
    total = sum(block.whole for block in kept)
    now, choice = total, []
    for block in kept:
        choice.append(now > share * total and block.recomputed < block.whole)
        now -= (block.whole - block.recomputed) * choice[-1]
    return choice


class _Measuring:
    """Hooks of blocks that measure each of them once, and then settle which are recomputed."""

    def __init__(self, blocks: list[nn.Module], share: float) -> None:
        self._blocks = blocks
        self._share = share
        self._kept: dict[int, Kept] = {}
        for block in blocks:
            recompute(block)
        # Before the forward but after FSDP2's own hooks, which put themselves in front: weights are there.
        self._hooks = [
            block.register_forward_pre_hook(functools.partial(self._before, place), with_kwargs=True)
            for place, block in enumerate(blocks)
        ]

    def _before(self, place: int, block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not (self._hooks and block.training and torch.is_grad_enabled()):
            return
        if place not in self._kept:
            self._kept[place] = measured(block, arguments, keywords)
        elif len(self._kept) < len(self._blocks):
            self._settle()  # a second forward, and some blocks were not in the first
        if len(self._kept) == len(self._blocks):
            self._settle()

    def _settle(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        places = sorted(self._kept)
        kept = [self._kept[place] for place in places]
        choice = chosen(kept, self._share)
        for place, again in zip(places, choice, strict=True):
            self._blocks[place].recomputing = again  # pyrefly: ignore[bad-argument-type]
        total = sum(block.whole for block in kept)
        now = sum(block.recomputed if again else block.whole for block, again in zip(kept, choice, strict=True))
        said = "recomputation.budget: %d of %d blocks are recomputed, which keeps %.0f %% of %.3g GB of activations"
        figures = (sum(choice), len(self._blocks), 100 * now / max(1, total), total / 1e9)
        if now > self._share * total:
            log.warning(said + ", as little as can be", *figures)
        else:
            log.info(said, *figures)


def measured(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Kept:
    """What a recomputed ``block`` keeps for these arguments, by running it and leaving no trace."""
    given = [value for value in tree_leaves((arguments, keywords)) if isinstance(value, Tensor)]
    inputs = {_storage(value): _bytes(value) for value in given if value.requires_grad}
    # Weights are there anyway, and what all blocks are given alike, such as a rotation, no block keeps for itself.
    elsewhere = {_storage(value) for value in (*block.parameters(), *block.buffers(), *given)} - inputs.keys()
    saved: dict[int, tuple[Tensor, int]] = {}

    def note(value: Tensor) -> Tensor:
        if (storage := _storage(value)) not in elsewhere:
            saved[storage] = (value.detach(), _bytes(value))  # held, so that no other takes its place
        return value

    device = next((value.device for value in given), torch.device("cpu"))
    caching = torch.is_autocast_cache_enabled()
    block.recomputing = False  # pyrefly: ignore[bad-argument-type]
    torch.set_autocast_cache_enabled(False)
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            buffers_aside(block),
            torch.autograd.graph.saved_tensors_hooks(note, lambda value: value),
        ):
            # Of the class: an instance's own may be compiled, and would be once more for this.
            type(block).forward(block, *arguments, **keywords)
    finally:
        torch.set_autocast_cache_enabled(caching)
        block.recomputing = True  # pyrefly: ignore[bad-argument-type]
    return Kept(sum(size for _, size in saved.values()), sum(inputs.values()))


def _storage(value: Tensor) -> int:
    """The same for tensors that share memory; tensors of another kind, such as float8 ones, have none to share."""
    return value.untyped_storage()._cdata if type(value) in (Tensor, nn.Parameter) else id(value)


def _bytes(value: Tensor) -> int:
    if type(value) in (Tensor, nn.Parameter):
        return value.untyped_storage().nbytes()
    return value.numel() * value.element_size()
