"""A model that holds some of its stages, and runs one of them at a time.

Shape suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_parallel.pipeline.absent import Absent


class Stages:
    """The stages of a model that this rank holds, and the switch between them.

    The model's own forward runs for every stage, with the real tokens, so that masks, rotations and whatever else
    follows from tokens are made where they are needed. Blocks of other stages give their input on; the first block of
    the stage is given the hidden states that came from the stage before instead of what was made of the absent
    embedding, and what the last one gives is what the stage gives.

    Args:
        model: whose forward is replaced, in place; it can only be called inside of ``running``.
        blocks: this rank's blocks by name, for each of its stages in the order of the model.
        afterwards: modules that come after all blocks, by name, where this rank has the last stage.
        count: stages of the whole model.
        ranks: of the pipeline.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[int, Mapping[str, nn.Module]],
        afterwards: Mapping[str, nn.Module],
        count: int,
        ranks: int,
    ) -> None:
        self.count = count
        self.ranks = ranks
        self.held = tuple(blocks)
        self._kind = type(model).__name__
        self._slots = {
            stage: [_Slot(model, name, block) for name, block in named.items()] for stage, named in blocks.items()
        }
        self._stage: int | None = None
        self._received: Tensor | None = None
        self._calls: _Calls | None = None
        self._replace_forward(model)
        for name, module in afterwards.items():
            module.register_forward_pre_hook(functools.partial(self._check_place, name))

    def is_last(self, stage: int) -> bool:
        """Whether ``stage`` ends the model: its output is that of the model's forward."""
        return stage == self.count - 1

    @property
    def ends_model(self) -> bool:
        """Whether the stage that is running ends the model."""
        return self._stage is not None and self.is_last(self._stage)

    @contextmanager
    def running(self, stage: int, received_BTD: Tensor | None) -> Iterator[None]:
        """Calls of the model run ``stage`` inside.

        Args:
            stage: one of ``held``.
            received_BTD: what the stage before gave; None for the first.
        """
        assert (received_BTD is None) == (stage == 0), "every stage but the first is given hidden states"
        self._stage, self._received = stage, received_BTD
        try:
            yield
        finally:
            self._stage, self._received = None, None

    def _replace_forward(self, model: nn.Module) -> None:
        forward = model.forward

        @functools.wraps(forward)
        def run(*arguments: Any, **keywords: Any) -> Tensor:
            stage = self._stage
            if stage is None:
                raise ConfigError(
                    f"this rank holds only some blocks of {self._kind}, which therefore cannot be called by itself",
                    hint="leave out what calls the model beside executor.pipeline, such as generation of texts, or set "
                    "pp of world.auto to 1",
                    about=model,
                )
            with self._standing(stage) as calls:
                output = forward(*arguments, **keywords)
            self._check(calls.places, len(self._slots[stage]))
            output = output if self.is_last(stage) else calls.output
            if not isinstance(output, Tensor):
                raise ConfigError(
                    f"{self._kind} gives {type(output).__name__}, but what stages of a pipeline give each other, and "
                    "the last one gives the loss, is one tensor of hidden states",
                    hint="set pp of world.auto to 1",
                    about=model,
                )
            return output

        model.forward = run

    @contextmanager
    def _standing(self, active: int) -> Iterator[_Calls]:
        """Only the blocks of one stage do anything inside; gives those that were called."""
        self._calls = calls = _Calls()
        try:
            for stage, slots in self._slots.items():
                for place, slot in enumerate(slots):
                    if stage == active:
                        slot.put(_Called(slot.block, place, self._received if place == 0 else None, calls))
                    else:
                        slot.put(slot.absent)
            yield calls
        finally:
            self._calls = None
            for slots in self._slots.values():
                for slot in slots:
                    slot.put(slot.block)

    def _check_place(self, name: str, *_: Any) -> None:
        """Hook before a module of the last stage: what comes before the blocks would have to be on the first."""
        if self._calls is not None and self.ends_model and len(self._calls.places) < len(self._slots[self.count - 1]):
            raise ConfigError(
                f"{name} of {self._kind} has parameters and is called before the blocks, but it is on the last rank of "
                "the pipeline, and the first block on the first",
                hint="set pp of world.auto to 1, or, if it is a table, let the model's parallel_plan name it in "
                "embeddings",
            )

    def _check(self, places: Sequence[int], blocks: int) -> None:
        if list(places) != list(range(blocks)):
            raise ConfigError(
                f"the blocks of {self._kind} are not called once each, one after the other, as stages of a pipeline "
                "have to be",
                hint="set pp of world.auto to 1",
            )


class _Slot:
    """Where a block stands in the model."""

    def __init__(self, model: nn.Module, name: str, block: nn.Module) -> None:
        owner, _, self._key = name.rpartition(".")
        self._owner = model.get_submodule(owner)
        self.block = block
        self.absent = Absent(block)

    def put(self, module: nn.Module) -> None:
        # Not setattr, which would tell wrappers of the model about a module that only stands in for another.
        self._owner._modules[self._key] = module


class _Calls:
    """The blocks that one forward has called, in order, and what the last of them gave."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.output: Any = None


class _Called(Absent):
    """A block during one forward: notes that it was called and what it gave."""

    def __init__(self, block: nn.Module, place: int, received_BTD: Tensor | None, calls: _Calls) -> None:
        super().__init__(block)
        self._place = place
        self._received = (received_BTD,)
        self._calls = calls

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the block gives, for the received hidden states where there are any."""
        received_BTD = self._received[0]
        if received_BTD is not None:
            if arguments:
                arguments = (received_BTD, *arguments[1:])
            else:
                keywords = keywords | {next(iter(keywords)): received_BTD}
        output = self._original[0](*arguments, **keywords)
        self._calls.places.append(self._place)
        self._calls.output = output
        return output
