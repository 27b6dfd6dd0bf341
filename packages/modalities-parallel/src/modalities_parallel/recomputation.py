"""Which blocks of a model, and what of them, is computed again in backward to save memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_parallel.recomputed import recomputable, recompute

MATRIX_PRODUCTS = (
    "aten.mm",
    "aten.addmm",
    "aten._scaled_mm",
    "aten._grouped_mm",
    "modalities.grouped_linear",
)
"""Operations whose results cost the most to make again per byte."""
SAVED = (*MATRIX_PRODUCTS, "aten._scaled_dot_product_*attention*", "flash_attn*", "flex_attention")
"""What recomputation.selective keeps by default: matrix products and the output of attention."""


def whole_blocks(model: Model, every: int = 1) -> Model:
    """Keep only the input of blocks and run them again in backward.

    A step costs up to a third more FLOPs, and nearly all memory of activations is saved; losses and gradients stay
    the same, bit for bit on one device. Put it inside of parallel.fsdp2, as the model that it shards; with
    executor.plain's ``compile`` a block and its repetition are one graph.

    Method: gradient checkpointing (arXiv:1604.06174).

    Args:
        model: changed in place; its parallel plan names the blocks.
        every: 1 recomputes all blocks, 2 every second, 3 every third and so on, and the others keep everything.

    Raises:
        ConfigError: the plan names no blocks, they are recomputed already, or ``every`` is not a number of theirs.
    """
    blocks = recomputable(model, whole_blocks)
    if not 1 <= every <= len(blocks):
        raise ConfigError(
            f"every is {every}, but of {len(blocks)} blocks every 1st to every {len(blocks)}th can be recomputed",
            about=(whole_blocks, "every"),
        )
    for block in blocks[every - 1 :: every]:
        recompute(block)
    return model


def selective(model: Model, save: tuple[str, ...] = SAVED, every: int | None = 2) -> Model:
    """Keep the results of costly operations in blocks and compute the others again in backward.

    Norms, activations, rotations and the like are cheap to repeat and take much of the memory. As torchtitan does, by
    default half of the matrix products are repeated as well. Put it inside of parallel.fsdp2, as the model that it
    shards.

    Method: selective recomputation (arXiv:2205.05198, section 5), by operation.

    Args:
        model: changed in place; its parallel plan names the blocks.
        save: globs of operations whose results are kept, named as torch does: ``aten.mm``, ``aten.mm.default``,
            ``aten._scaled_dot_product_*``; operations that change their input are never kept.
        every: of the matrix products among them, every n-th is computed again all the same; null keeps all.

    Raises:
        ConfigError: the plan names no blocks, they are recomputed already, ``every`` is less than 1, or a glob of
            ``save`` matches no operation.
    """
    blocks = recomputable(model, selective)
    if every is not None and every < 1:
        raise ConfigError(
            f"every is {every}; it is 1 or more, or null to keep all matrix products", about=(selective, "every")
        )
    if save != SAVED:
        _check(save)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return create_selective_checkpoint_contexts(_policy(save, every))

    for block in blocks:
        recompute(block, contexts)
    return model


def _policy(save: Sequence[str], every: int | None) -> Callable[..., CheckpointPolicy]:
    """What is kept of one call of one block; products are counted anew when it is repeated."""
    counts = {False: 0, True: 0}

    def policy(context: SelectiveCheckpointContext, operation: Any, *arguments: Any, **keywords: Any) -> Any:
        kept, product = _kind(operation, tuple(save))
        if kept and product and every is not None:
            counts[context.is_recompute] += 1
            kept = counts[context.is_recompute] % every != 0
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


@functools.cache
def _kind(operation: Any, save: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether an operation's results may be kept, and whether it is a matrix product."""
    schema = getattr(operation, "_schema", None)
    if schema is not None and schema.is_mutable:
        return False, False
    names = (str(operation), str(getattr(operation, "overloadpacket", operation)))
    return _matches(names, save), _matches(names, MATRIX_PRODUCTS)


def _matches(names: Iterable[str], globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for name, glob in itertools.product(names, globs))


def _check(save: Sequence[str]) -> None:
    """Refuse globs that match nothing; of a namespace that is not loaded nothing can be said."""
    full = [name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names()]
    names = {*full, *(f"{name}.default" for name in full), *(".".join(name.split(".")[:2]) for name in full)}
    spaces = {name.partition(".")[0] for name in names}
    higher_order = ("flex_attention",)
    for glob in save:
        known = _matches((*names, *higher_order), (glob,))
        space, dot, _ = glob.partition(".")
        if not known and (not dot or space in spaces):
            near = get_close_matches(glob if dot else f"aten.{glob}", sorted(names), n=3)
            raise ConfigError(
                f"save has {glob!r}, which is no operation of torch",
                hint=f"near it: {', '.join(near)}" if near else "operations are named like aten.mm",
                about=(selective, "save"),
            )
