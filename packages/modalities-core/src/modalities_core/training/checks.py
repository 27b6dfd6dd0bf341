"""What can be wrong with a run before its first step; needs shapes only, so it works on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batches, Executor, HeldOut, Model, World
from modalities_core.training.consumption import samples_of
from modalities_core.training.evaluator import Evaluation


def check_run(model: Model, world: World, batches: Batches, evaluations: Sequence[Evaluation]) -> None:
    """Refuse what would fail, or train something else than meant, once the run is under way.

    Raises:
        ConfigError: token ids beyond the vocabulary, sequences beyond the model's length, images of another size,
            gradients that would not be reduced, or two held-out sets of one name.
    """
    check_data(model, batches, "the training data")
    for evaluation in evaluations:
        check_data(model, evaluation.batches, f"the held-out set {evaluation.name!r}")
    for name, count in Counter(evaluation.name for evaluation in evaluations).items():
        if count > 1:
            raise ConfigError(f"{count} held-out sets have the name {name!r}", hint="give each a name of its own")
    world.check(model)


def check_micro_batches(executor: Executor, batches: Batches, world: World) -> None:
    """Refuse steps that the executor cannot take, such as of too few micro batches for a pipeline.

    Raises:
        ConfigError: as the executor says.
    """
    check, size = getattr(executor, "check_micro_batches", None), getattr(batches, "micro_batch_size", None)
    if check is not None and size is not None:
        for samples in sorted({len(samples_of(batches, 0)), batches.samples_per_step}):
            check(samples // (size * world.data_size))


def check_data(model: Model, data: Batches | HeldOut, called: str) -> None:
    """Refuse data that the model cannot take.

    Args:
        model: what reads it.
        data: its largest id, sequence length and image shape are compared.
        called: what an error calls it.

    Raises:
        ConfigError: it does not fit.
    """
    if data.largest_id >= model.vocab_size:
        raise ConfigError(
            f"vocab_size is {model.vocab_size}, but {called} has the token id {data.largest_id}",
            hint=f"set vocab_size to at least {data.largest_id + 1}",
            about=(model, "vocab_size"),
        )
    wanted, found = getattr(model, "image_shape", None), getattr(data, "image_shape", None)
    if wanted is not None and tuple(wanted) != found:
        raise ConfigError(
            f"the model looks at images of {_shape(wanted)}, {called} has {_shape(found)}",
            hint="give the model the size that the data has, or prepare the data in the model's",
            about=model,
        )
    if data.sequence_length > model.sequence_length:
        raise ConfigError(
            f"sequence_length is {model.sequence_length}, but {called} has sequences of {data.sequence_length} tokens",
            hint=f"set it to at least {data.sequence_length}, or cut the data shorter",
            about=(model, "sequence_length"),
        )


def _shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape)) + " (height, width, channels)"


def check_positive(owner: object, **numbers: float | None) -> None:
    """Refuse numbers that are neither positive nor None.

    Raises:
        ConfigError: naming the argument.
    """
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ConfigError(f"{name} has to be positive, not {number}", about=(owner, name))
