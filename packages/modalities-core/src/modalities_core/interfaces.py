"""The seams of Modalities: the one file to read first.

A run is a graph of objects that know each other only by the Protocols below. Whatever a package registers, ours or
yours, has to satisfy one of them. Nothing here imports torch: the tensor types are for readers and type checkers.

Shape suffixes: B batch (samples), T tokens, D hidden size, V vocabulary size, N any count of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor, nn

    from modalities_core.events import Event


# ---------------------------------------------------------------------------------------------------------- data


class Samples(NamedTuple):
    """Samples as they come from a dataset, on the host.

    tokens: (N, T + 1) integers; inputs are the first T, targets the last T.
    weights: (N, T) float32, how much each target counts in the loss; None where all count 1.
    segments: (N, T) int32, the number of each input's document within its sample, rising from 0; inputs attend only
        to their own segment, and positions count from its start. None where a sample is one piece of text.
    images: (N, height, width, channels) uint8, the image each text belongs to; None where there are none.
    """

    tokens: np.ndarray
    weights: np.ndarray | None = None
    segments: np.ndarray | None = None
    images: np.ndarray | None = None


@runtime_checkable
class Dataset(Protocol):
    """A fixed, indexable set of equally long samples. No torch needed.

    One with images also says their ``image_shape``, (height, width, channels); batches hand it on, and a model that
    has an ``image_shape`` takes no others.
    """

    sequence_length: int
    """T, target tokens per sample."""
    largest_id: int
    """The largest token id that occurs; a model's vocabulary must be larger."""
    fingerprint: str
    """Changes whenever the samples do; a resumed run refuses another one."""
    bytes_per_token: float | None
    """UTF-8 bytes of text per token, for bits per byte; None where unknown."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def gather(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``, (N,) int64, each in [0, len)."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    """One more than the largest id it can give."""
    end_of_document: int
    """The id written after every document."""
    fingerprint: str
    """Equal for tokenizers that give equal ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any special token."""
        ...

    def encode_flat(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents back to back, (sum of lengths,) uint32, and offsets, (documents + 1,) int64."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become replacement characters."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro batch on one rank, as tensors.

    tokens_BT: (B, T) int64 inputs.
    targets_BT: (B, T) int64, the token that follows each input.
    weights_BT: (B, T) float32, how much each target counts; None where all count 1.
    segments_BT: (B, T) int32, the number of each input's document in its sample, from 0; None where it is one text.
    images_BCHW: (B, channels, height, width) uint8, the image each text belongs to; None where there are none.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor | None = None
    segments_BT: Tensor | None = None
    images_BCHW: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``, copied without blocking the host where its memory is pinned."""
        optional = (self.weights_BT, self.segments_BT, self.images_BCHW)
        moved = [None if tensor is None else tensor.to(device, non_blocking=True) for tensor in optional]
        pair = self.tokens_BT.to(device, non_blocking=True), self.targets_BT.to(device, non_blocking=True)
        return Batch(*pair, *moved)

    def part(self, place: int, parts: int) -> Batch:
        """The tokens of every sample that are in one of ``parts`` equal parts, counted from 0; images stay whole."""
        size = self.tokens_BT.shape[1] // parts
        own = (slice(None), slice(place * size, (place + 1) * size))
        optional = (self.weights_BT, self.segments_BT)
        weights_BT, segments_BT = (None if tensor is None else tensor[own] for tensor in optional)
        return Batch(self.tokens_BT[own], self.targets_BT[own], weights_BT, segments_BT, self.images_BCHW)


@runtime_checkable
class Batches(Protocol):
    """Training data: which samples each step sees is a pure function of the step, so resuming is arithmetic.

    Where steps differ in size, ``samples(step: int) -> range`` gives the numbers of the zero-based step's samples over
    all ranks, in the order of the run.
    """

    samples_per_step: int
    """Samples in one step over all ranks, micro batches and accumulation; the most of any step."""
    sequence_length: int
    largest_id: int
    fingerprint: str
    """Of the data and of everything that decides the order."""

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """This rank's micro batches of the zero-based ``step``, on the host or on the world's device."""
        ...


@runtime_checkable
class HeldOut(Protocol):
    """Evaluation data: one pass over a fixed set, the same number of batches on every rank."""

    sequence_length: int
    largest_id: int
    bytes_per_token: float | None

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches; where the set does not divide evenly, padding carries weight 0."""
        ...


# --------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """What a model tells about its parts so that any parallelism can be applied from outside.

    All are globs of dotted names; a model need only declare what it wants to be used with. Where ``column`` or ``row``
    name a module its ``weight`` and ``bias`` are meant; they may also name parameters. Weights are (..., out, in), as
    in ``nn.Linear``. A module that directly holds such a layer is entered with whole hidden states, its first
    argument, and left with their sum over the tensor-parallel ranks. All others work on each token by itself.

    blocks: modules that are called one after the other, each one unit of sharding, recomputation and compilation, and
        what a pipeline shares out to its stages; hidden states are their first argument and what they give.
    column: layers that tensor parallelism splits by their output features.
    row: layers that follow them, split by their input features.
    attention: modules in which tokens meet, with ``column`` layers for queries, keys and values and a ``row`` layer for
        what comes of them; context parallelism exchanges tokens for heads between them.
    head_size: elements of one attention head, which stay together; None without attention.
    column_norms: norms over all the features that a ``column`` layer gives.
    embeddings: tables looked up by token id or position before the blocks, split by rows; a pipeline has them in its
        first stage, and whatever else is outside of blocks in its last.
    experts: modules with experts, which expert parallelism shares out; see ``Experts``.
    """

    blocks: tuple[str, ...] = ()
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    head_size: int | None = None
    column_norms: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


class Experts(Protocol):
    """A module with experts, as expert parallelism needs it.

    ``expert_parameters`` names its own parameters that have the experts as first dimension. ``apply_experts`` is called
    by its forward, and is replaced by one that sends rows to the ranks of their experts.
    """

    expert_parameters: tuple[str, ...]

    def apply_experts(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Each row through its expert: (R, D) to (R, D).

        Args:
            rows_RD: all rows of expert 0, then those of expert 1, and so on.
            ends_E: int32, where the rows of each of this rank's experts end.
        """
        ...


class VocabularyShard(Protocol):
    """This rank's part of an output head that is split over ranks by vocabulary (loss parallelism).

    A head that is split has one as ``vocabulary_shard``, and its ``weight`` is this rank's rows of the whole. A loss
    that knows this takes its own logits from them and never gathers any; any other calls the head, which gathers.
    """

    first: int
    """The id of the first row."""

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks that share the head, in place; autograd does not see it."""
        ...

    def max_(self, values: Tensor) -> Tensor:
        """Likewise the largest."""
        ...


@runtime_checkable
class Model(Protocol):
    """A ``torch.nn.Module`` that turns tokens into hidden states and owns its output head.

    It can be built on the meta device; ``initial_values`` then gives every parameter and buffer. It may also have
    ``finish_step(world: World) -> None``, called on every rank after each optimizer step for what no gradient
    changes, such as the balance of experts: collective, all state in buffers, never waiting for the device; in a
    pipeline over the ranks that hold the same blocks. And ``causal_flops_per_token(sequence_length: int) -> float``, in
    which attention counts with the share of it that causality leaves over. A wrapper that puts it into another
    precision names that as ``computing_dtype``.
    """

    vocab_size: int
    sequence_length: int
    """The longest sequence it takes."""
    head: nn.Module
    """Hidden states (..., D) to logits (..., V)."""

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) int64 to hidden states (B, T, D).

        A model that can keep documents apart also takes ``segments_BT`` by keyword, one that looks at images
        ``images_BCHW``, as in ``Batch``; data that has them is refused with any other. A model with more to say than
        hidden states may return a NamedTuple of tensors, for a loss that knows it.
        """
        ...

    def parallel_plan(self) -> ParallelPlan:
        """What may be sharded, recomputed and compiled as one."""
        ...

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole initial value of each parameter and buffer, float32 on the CPU; the same on every rank."""
        ...

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token, forward and backward (PaLM convention, arXiv:2204.02311 appendix B)."""
        ...


class LossSum(NamedTuple):
    """A loss that can be added up before it is divided: over micro batches, ranks and steps.

    loss: scalar float32, weighted sum over tokens, in nats.
    tokens: scalar float32, the sum of the weights.
    """

    loss: Tensor
    tokens: Tensor


@runtime_checkable
class Loss(Protocol):
    """Hidden states and the output head to a sum of losses; logits need never exist whole.

    A loss that optimises more than it should be judged by (label smoothing, z-loss) has an attribute ``evaluation``:
    the loss that is reported on held-out data instead of itself.
    """

    def __call__(self, hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> LossSum:
        """The summed loss of a micro batch and the weight it was summed over."""
        ...


# ------------------------------------------------------------------------------------------------------ training


@runtime_checkable
class World(Protocol):
    """The processes of a run, and what one of them may ask of the others. All methods are collective.

    It may also have ``apart() -> World``: the same ranks, on the CPU, for another thread to talk to while this one is
    in use. Checkpoints are written in the background only where it has.
    """

    rank: int
    size: int
    data_rank: int
    """This rank's place among those that see different data."""
    data_size: int
    sequence_rank: int
    """This rank's place among those that share the tokens of each sample (context parallelism)."""
    sequence_size: int
    """Into how many parts samples are cut; where it is more than 1 a model gives hidden states of this rank's part."""
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, in place."""
        ...

    def norm_share(self, parameters: Iterable[Tensor], order: float) -> Tensor:
        """This rank's share of the norm of the gradients, a scalar on the device.

        For order 1 or 2 of the sum of abs(g) ** order: added up over all ranks, the shares are the whole. For infinity
        the largest abs(g) of this rank. Not a collective itself, so that the share can travel in the step's one
        reduction, and the host does not wait for it.
        """
        ...

    def check(self, model: Model) -> None:
        """Raise ConfigError if gradients of ``model`` would not be reduced over the ranks."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, a JSON value, on every rank."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks; name those that do not come."""
        ...

    def close(self) -> None:
        """Leave the process group. Drop sharded objects first."""
        ...


@runtime_checkable
class Executor(Protocol):
    """Runs the model on micro batches; the loop never asks whether it is a pipeline.

    It may also have any of these, which the loop asks for by name:

    ``scaler``, None or an object with a ``scale``, a float32 scalar on the device that losses are multiplied by before
    backward, and ``update(overflowed: Tensor) -> None``, called after each step with a scalar that is not 0 where the
    gradient was not finite though every loss was; neither makes the host wait.

    ``prepare(steps: int, tokens_per_step: int) -> None``, called once before the first step, after a checkpoint is
    loaded, with the length of the whole run.

    ``state() -> dict[str, JSON]`` and ``restore(state) -> None``, what a checkpoint keeps of it; before ``prepare``.

    ``phases``, a ``modalities_core.training.throughput.Phases`` with which it times forward and backward.

    ``check_micro_batches(count: int) -> None``, which raises ConfigError where it cannot take a step of so many.

    ``after_first: Callable[[LossSum], None] | None``, called between the first of several micro batches and the second,
    when the gradients are those of the first alone, over all ranks, with this rank's share of its sums.
    """

    model: Model

    def forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        """Add the gradient of the *summed* loss to the parameters.

        Returns:
            This rank's share of the sums, detached, on the device: added up over all ranks they are the whole, also
            where several ranks see the same data.
        """
        ...

    def evaluate(self, batch: Batch) -> LossSum:
        """This rank's share of the sums, without gradients, in evaluation mode."""
        ...


class Training(NamedTuple):
    """What a hook may look at.

    folder: of the run.
    first_step, steps: completed steps at the start of this process, and of the whole run.
    emit: hands an event to the sinks; does nothing on ranks other than 0.
    """

    folder: Path
    executor: Executor
    world: World
    first_step: int
    steps: int
    emit: Callable[[Event], None]


@runtime_checkable
class Hook(Protocol):
    """Something that happens beside the updates, on every rank alike, such as profiling; its time is not training."""

    def start(self, training: Training) -> None:
        """Before the first step of this process."""
        ...

    def after_step(self, step: int) -> None:
        """After each update; ``step`` counts those of the whole run. What it raises ends the run."""
        ...

    def close(self) -> None:
        """At the end, also of a run that failed."""
        ...


@runtime_checkable
class TextGenerator(Protocol):
    """Continues texts. On several ranks it is called on all of them alike, for they may share one model."""

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """What follows each of ``prompts``."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """A pure function of the step."""

    def __call__(self, step: int) -> float:
        """The factor on the peak learning rate for the zero-based ``step``."""
        ...


@runtime_checkable
class CheckpointFormat(Protocol):
    """How tensors lie in a checkpoint's folder. When and which is the business of the policy, not of the format.

    It may also have ``stage(model, optimizer) -> Callable[[Path, World], None]``, for checkpoints that are written
    while training goes on. It copies all that ``save`` would write into the memory of the host, and gives a function
    that writes the copy as ``save`` does: in another thread, and collective among those of all ranks, which the World
    is for. That function has ended before ``stage`` is called again. Where there is no room for the copy it raises
    MemoryError, and the checkpoint is saved in the foreground. ``reserve(model, optimizer) -> None``, called after the
    first step of a process, may begin to make that room.
    """

    def save(self, folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Write every rank's part into the existing ``folder``, in files of any depth, fsynced; collective."""
        ...

    def load(self, folder: Path, model: Model, optimizer: torch.optim.Optimizer | None) -> None:
        """Read into ``model`` and, unless None, ``optimizer``, under any number of ranks; collective.

        Raises:
            CheckpointError: tensors are missing, extra, or of another shape or dtype.
        """
        ...


@runtime_checkable
class Sink(Protocol):
    """A consumer of events on rank 0. Whatever it raises becomes one warning; it never stops a run."""

    def consume(self, event: Event) -> None:
        """Take one event; must not block for long."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...
