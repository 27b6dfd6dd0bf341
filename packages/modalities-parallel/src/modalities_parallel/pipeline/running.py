"""One stage of a model as torch's schedules run it.

Shape suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from modalities_core.training.throughput import Phases
from modalities_parallel.pipeline.passing import Line

Run = Callable[[int, Tensor | None, int], Tensor]
"""A stage, hidden states from the stage before, and the place of the micro batch in its step, to what the stage gives:
hidden states, or in the last stage the loss."""


class StageRun(nn.Module):
    """What a schedule calls for a stage; none of the model's modules lie in it, so that it reduces no gradients.

    Args:
        stage: its number.
        run: runs it.
        parameters: of all of this rank's stages.
    """

    def __init__(self, stage: int, run: Run, parameters: Callable[[], Iterator[nn.Parameter]]) -> None:
        super().__init__()
        self._stage = stage
        self._run = run
        self._parameters_of_rank = parameters

    def forward(self, received: Tensor, *, place: Tensor) -> Tensor:
        """Hidden states, or in the last stage the loss.

        Args:
            received: (B, T, D) from the stage before; the first stage is given anything.
            place: (1,) int64 on the CPU, which micro batch of the step it is.
        """
        return self._run(self._stage, received if self._stage else None, int(place))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the model that are here: schedules that compute gradients of weights apart look for them."""
        return self._parameters_of_rank()


class TimedStage(PipelineStage):
    """A stage whose forward and backward count to the phases of a run; waiting for others counts to neither."""

    phases: Phases

    def forward_one_chunk(self, *arguments: Any, **keywords: Any) -> Any:
        """As of ``PipelineStage``."""
        with self.phases.timed("forward"):
            return super().forward_one_chunk(*arguments, **keywords)

    def backward_one_chunk(self, *arguments: Any, **keywords: Any) -> Any:
        """Likewise."""
        with self.phases.timed("backward"):
            return super().backward_one_chunk(*arguments, **keywords)

    def backward_weight_one_chunk(self, *arguments: Any, **keywords: Any) -> Any:
        """Likewise."""
        with self.phases.timed("backward"):
            return super().backward_weight_one_chunk(*arguments, **keywords)


def schedule_stage(
    module: StageRun, stage: int, count: int, line: Line, key: Any, device: torch.device, phases: Phases
) -> TimedStage:
    """A stage with the shapes that ``line`` has seen for batches of ``key``, so that torch need not find them out.

    Args:
        module: runs it.
        stage: its number.
        count: stages of the model.
        line: the ranks of the pipeline.
        key: of the batches.
        device: of this rank.
        phases: forward and backward are added to.
    """
    first, last = stage == 0, stage == count - 1
    takes = torch.empty(1, dtype=torch.int64, device="meta") if first else _like(line, stage, key)
    gives = torch.empty((), device="meta", requires_grad=True) if last else _like(line, stage + 1, key)
    made = TimedStage(module, stage, count, device, input_args=(takes,), output_args=(gives,), group=line.group)
    made.phases = phases
    return made


def reduce_gradients(model: nn.Module, stage: TimedStage) -> None:
    """Add up over the data-parallel ranks the gradients of all micro batches and stages, at once; collective.

    Args:
        model: the root of FSDP2 that the stages lie in.
        stage: any of them; torch reduces what its module holds.
    """
    own = stage.submod
    try:
        stage.submod = model
        stage.perform_reduce_grad(1)
    finally:
        stage.submod = own


def _like(line: Line, stage: int, key: Any) -> Tensor:
    shape = line.shape(stage, key)
    return cast(Tensor, torch.empty(shape.sizes, dtype=shape.dtype, device="meta", requires_grad=True))
