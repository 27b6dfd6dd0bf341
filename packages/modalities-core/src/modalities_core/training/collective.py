"""Doing something on one rank or on all of them such that a failure anywhere becomes a failure everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from modalities_core import errors
from modalities_core.interfaces import World

T = TypeVar("T")


def on_first(world: World, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone and hand its JSON value to every rank; collective.

    Raises:
        Exception: what ``action`` raised, on rank 0; on the others the same class if it is one of
            :mod:`modalities_core.errors`, else DistributedError.
    """
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if world.rank == 0:
        try:
            outcome = {"value": action()}
        except Exception as error:
            failure = error
            outcome = {"error": type(error).__name__, "message": str(error), "hint": ""}
            if isinstance(error, errors.ModalitiesError):
                outcome |= {"message": error.message, "hint": error.hint}
    outcome = world.broadcast(outcome)
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise _remote(outcome)
    return outcome["value"]


def together(world: World, action: Callable[[], T], doing: str) -> T:
    """Run ``action`` on every rank; if it fails on any, it fails on all; collective.

    Args:
        world: the ranks.
        action: what each rank does.
        doing: a phrase for the error of the ranks that did not fail, such as ``saving a checkpoint``.

    Raises:
        Exception: what this rank's ``action`` raised.
        DistributedError: only other ranks failed.
    """
    value: Any = None
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:
        failure = error
    failed = torch.tensor([0.0 if failure is None else 1.0], device=world.device)
    count = int(world.sum(failed).item())
    if failure is not None:
        raise failure
    if count:
        ranks = "one other rank" if count == 1 else f"{count} other ranks"
        raise errors.DistributedError(f"{ranks} failed while {doing}", hint="the cause is in the log of that rank")
    return value


def _remote(outcome: dict[str, Any]) -> Exception:
    kind = getattr(errors, outcome["error"], None)
    if isinstance(kind, type) and issubclass(kind, errors.ModalitiesError):
        return kind(outcome["message"], hint=outcome["hint"])
    return errors.DistributedError(f"rank 0 failed: {outcome['error']}: {outcome['message']}")
