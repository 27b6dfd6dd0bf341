"""In which order the stages of a pipeline work on micro batches: torch's schedules, by our names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from modalities_core.errors import ConfigError

Name = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]


def check_stages(name: str, stages_per_rank: int, about: object) -> None:
    """Refuse a schedule that does not fit the number of stages on each rank.

    Args:
        name: of the schedule.
        stages_per_rank: as parallel.fsdp2 was given.
        about: whose argument ``schedule`` is, for error positions.

    Raises:
        ConfigError: there is no such schedule, or it wants more or fewer stages.
    """
    if name not in get_args(Name):
        known = get_args(Name)
        message = f"schedule is {', '.join(known[:-1])} or {known[-1]}, not {name!r}"
        raise ConfigError(message, about=(about, "schedule"))
    if name in ("gpipe", "1f1b") and stages_per_rank != 1:
        raise ConfigError(
            f"{name} works with one stage per rank, but the model has {stages_per_rank}",
            hint="set schedule to interleaved_1f1b, or stages_per_rank of parallel.fsdp2 to 1",
            about=(about, "schedule"),
        )
    if name == "interleaved_1f1b" and stages_per_rank == 1:
        raise ConfigError(
            "interleaved_1f1b wants several stages on each rank, but the model has one",
            hint="set stages_per_rank of parallel.fsdp2 to 2, or schedule to 1f1b",
            about=(about, "schedule"),
        )


def check_micro_batches(name: str, count: int, ranks: int, about: object) -> None:
    """Refuse steps whose micro batches the schedule cannot share out.

    Args:
        name: of the schedule.
        count: micro batches of one step on each data-parallel rank.
        ranks: of the pipeline.
        about: whose argument ``schedule`` is, for error positions.

    Raises:
        ConfigError: there are too few, or not a whole number of rounds.
    """
    if name == "1f1b" and count < ranks:
        raise ConfigError(
            f"1f1b on {ranks} stages needs at least {ranks} micro batches per step, but a step has {count}",
            hint="accumulate more: raise samples_per_step or lower micro_batch_size, or set schedule to gpipe",
            about=(about, "schedule"),
        )
    rounds = max(1, count // ranks)
    if name in ("interleaved_1f1b", "zero_bubble") and count % rounds:
        raise ConfigError(
            f"{name} on {ranks} ranks cannot share out {count} micro batches per step: they come in {rounds} rounds "
            "of equal size",
            hint=f"set samples_per_step or micro_batch_size so that a step has {count // ranks * ranks} or "
            f"{(count // ranks + 1) * ranks}",
            about=(about, "schedule"),
        )


def build(name: str, stages: Sequence[Any], count: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Torch's schedule over this rank's stages; gradients of the sum, nothing averaged.

    Args:
        name: of the schedule.
        stages: ``torch.distributed.pipelining.PipelineStage``, in order.
        count: micro batches of a step.
        loss: of what the last stage gives, and the number of the micro batch.
    """
    from torch.distributed import pipelining

    if name == "gpipe":
        return pipelining.ScheduleGPipe(stages[0], count, loss, scale_grads=False)
    if name == "1f1b":
        return pipelining.Schedule1F1B(stages[0], count, loss, scale_grads=False)
    if name == "interleaved_1f1b":
        return pipelining.ScheduleInterleaved1F1B(list(stages), count, loss, scale_grads=False)
    return pipelining.ScheduleInterleavedZeroBubble(list(stages), count, loss, scale_grads=False)
