"""How parameters of ours lie in the tensors of a Hugging Face checkpoint.

A link names some of ours, some of theirs, and how to get from one to the other. Together the links of a model name
every tensor of both exactly once. Each is affine, so that gradients follow from values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Link(Protocol):
    """Some tensors of ours and the same numbers in theirs; names in the order in which tensors are taken and given."""

    @property
    def ours(self) -> tuple[str, ...]:
        """Names of our parameters or buffers."""
        ...

    @property
    def theirs(self) -> tuple[str, ...]:
        """Names in the checkpoint."""
        ...

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """From ours, whole, to theirs."""
        ...

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """From theirs to ours."""
        ...


@dataclass(frozen=True, slots=True)
class Same:
    """One tensor under two names."""

    our: str
    their: str

    @property
    def ours(self) -> tuple[str, ...]:
        """The one name."""
        return (self.our,)

    @property
    def theirs(self) -> tuple[str, ...]:
        """The one name."""
        return (self.their,)

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As it is."""
        return list(tensors)

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As it is."""
        return list(tensors)


@dataclass(frozen=True, slots=True)
class Transposed(Same):
    """A matrix that is (in, out) in theirs, as in GPT-2."""

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(out, in) to (in, out)."""
        return [tensors[0].mT]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(in, out) to (out, in)."""
        return [tensors[0].mT]


@dataclass(frozen=True, slots=True)
class OneLess(Same):
    """A scale that theirs keeps as its distance from one, as in Gemma."""

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Scale to distance, at least in float32: in less, a scale near one would lose all that it differs by."""
        return [_wide(tensors[0]) - 1]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Distance to scale, at least in float32."""
        return [_wide(tensors[0]) + 1]


@dataclass(frozen=True, slots=True)
class Padded(Same):
    """A matrix of which ours stores more rows than there are token ids; theirs has none of these.

    Args:
        our: our name.
        their: their name.
        rows: token ids.
        stored: rows in ours.
    """

    rows: int
    stored: int

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Without the rows that no id has."""
        return [tensors[0][: self.rows]]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """With zeros in the rows that no id has."""
        return [F.pad(tensors[0], (0, 0, 0, self.stored - self.rows))]


@dataclass(frozen=True, slots=True)
class Joined:
    """Several of ours, one above the other, in one of theirs.

    Args:
        ours: in the order of the rows.
        their: the one name.
        sizes: rows of each of ours.
        transposed: theirs is (in, out), so that ours lie side by side in it.
    """

    ours: tuple[str, ...]
    their: str
    sizes: tuple[int, ...]
    transposed: bool = False

    @property
    def theirs(self) -> tuple[str, ...]:
        """The one name."""
        return (self.their,)

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Join them."""
        joined = torch.cat(list(tensors))
        return [joined.mT if self.transposed else joined]

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take them apart."""
        return list((tensors[0].mT if self.transposed else tensors[0]).split(self.sizes))


@dataclass(frozen=True, slots=True)
class Stacked:
    """One of ours with a leading dimension of experts; theirs has a tensor for each."""

    our: str
    theirs: tuple[str, ...]

    @property
    def ours(self) -> tuple[str, ...]:
        """The one name."""
        return (self.our,)

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """(experts, ...) to one tensor for each."""
        return list(tensors[0].unbind())

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each to (experts, ...)."""
        return [torch.stack(list(tensors))]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
