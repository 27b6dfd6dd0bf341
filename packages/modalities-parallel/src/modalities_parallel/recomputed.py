"""Blocks whose forward is run again in backward instead of keeping what it made.

Method: gradient checkpointing (arXiv:1604.06174) with torch.utils.checkpoint, its non-reentrant form. A block stays the
module that it is, with its names, hooks and parameters; only its class is one with another ``forward``. Hooks stand
around a forward, so those of FSDP2 stay outside: weights are gathered once for a backward and what is recomputed in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.compiling import blocks_of

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def recompute(block: nn.Module, contexts: Contexts | None = None) -> None:
    """Have ``block`` run again in backward what it does in forward, in training mode with gradients, from now on.

    Random numbers, autocast and buffers are as if it had run once. A block whose output depends on a buffer that its
    own forward changes cannot be recomputed.

    Args:
        block: changed in place.
        contexts: gives what stands around a forward and around its repetition, both modes of
            ``create_selective_checkpoint_contexts``, for operations whose results are kept; None keeps the inputs only.
    """
    block.__class__ = _recomputed(type(block))
    block.recomputing = True  # pyrefly: ignore[bad-argument-type]
    block.recomputation_contexts = contexts  # pyrefly: ignore[bad-argument-type]


def recomputable(model: Model, about: object) -> list[nn.Module]:
    """The blocks of the model's parallel plan.

    Args:
        model: whose blocks.
        about: the component that was given the model, for error positions.

    Raises:
        ConfigError: the plan names no blocks, or recomputation was set up before.
    """
    try:
        blocks = blocks_of(model)
    except ConfigError as error:
        if error.about is not model:
            raise
        message = f"{type(model).__name__} names no blocks in its parallel plan, so there is nothing to recompute"
        hint = "leave recomputation out, or let the model's parallel_plan name its blocks"
        raise ConfigError(message, hint=hint, about=(about, "model")) from None
    if any(hasattr(block, "recomputing") for block in blocks):
        raise ConfigError(
            f"the blocks of {type(model).__name__} are recomputed already",
            hint="keep one component of recomputation",
            about=(about, "model"),
        )
    if any("forward" in block.__dict__ for block in blocks):
        raise ConfigError(
            f"blocks of {type(model).__name__} have a forward of their own put over that of their class",
            hint="put recomputation inside, around the model as it is built",
            about=(about, "model"),
        )
    return blocks


@functools.cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """A class like ``kind`` and of its name; one for all blocks alike, so that compiled ones share a graph."""
    original = kind.forward

    @functools.wraps(original)
    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not (self.recomputing and self.training and torch.is_grad_enabled()):
            return original(self, *arguments, **keywords)

        def run(*arguments: Any, **keywords: Any) -> Any:
            return original(self, *arguments, **keywords)

        contexts = self.recomputation_contexts
        if not torch.compiler.is_compiling():
            contexts = functools.partial(_contexts, self, contexts)
        # Compiled, it is the graph's backward that repeats operations, and a change of a buffer is none of them.
        if contexts is None:
            return checkpoint(run, *arguments, use_reentrant=False, **keywords)
        return checkpoint(run, *arguments, use_reentrant=False, context_fn=contexts, **keywords)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _contexts(
    block: nn.Module, contexts: Contexts | None
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    forward, repetition = (nullcontext(), nullcontext()) if contexts is None else contexts()
    return forward, _both(buffers_aside(block), repetition)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(outer)
        stack.enter_context(inner)
        yield


@contextmanager
def buffers_aside(block: nn.Module) -> Iterator[None]:
    """Copies of the block's buffers stand in it inside, so that a repeated forward counts nothing twice."""
    places = [
        (part, name, buffer) for part in block.modules() for name, buffer in part._buffers.items() if buffer is not None
    ]
    try:
        for part, name, buffer in places:
            part._buffers[name] = buffer.clone()
        yield
    finally:
        for part, name, buffer in places:
            part._buffers[name] = buffer
