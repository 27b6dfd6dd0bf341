"""Arguments that are built later, by the component that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

T = TypeVar("T")


class DeferredArgument:
    """Marks an argument whose node is handed over as a zero-argument callable instead of a built object."""


Deferred = Annotated[Callable[[], T], DeferredArgument()]
"""``Deferred[Model]``: the component calls it when it is ready, say under ``torch.device("meta")``."""
