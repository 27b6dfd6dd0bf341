"""A run on devices that are not there: what it takes, and what changes that most."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Executor, Loss, Model
from modalities_core.training.parameters import as_module
from modalities_core.training.plan import matching
from modalities_core.training.throughput import mfu
from modalities_parallel.fsdp import Sharding
from modalities_parallel.planning.devices import Device
from modalities_parallel.planning.memory import Layout, RankMemory, optimizer_states, rank_memory
from modalities_parallel.planning.timing import StepTime, compute_seconds, step_time
from modalities_parallel.planning.trace import Trace, trace
from modalities_parallel.recomputation import selective
from modalities_parallel.recomputed import recompute

Recomputation = Literal["as configured", "selective", "whole_blocks"]
COMPUTING = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class PlannedRun:
    """What decides memory and time of a run.

    Args:
        model: whole, on the meta device.
        loss: of the run.
        states: bytes of the whole optimizer state of each trainable parameter.
        layout: how tensors lie on the ranks.
        ranks: devices in all.
        micro_batch_size: samples that a rank computes at once.
        sequence_length: tokens of a sample.
        samples_per_step: over all ranks and micro batches.
        compiled: whether blocks are compiled.
        weight_dtype: in which weights and gradients are stored; None is as they are.
        float32_states: whether the optimizer could keep its states in bfloat16 and does not.
        recomputation: of blocks, in the backward pass.
        traces: of micro batches, by what decides them; shared by all variants of a run.
    """

    model: Model
    loss: Loss
    states: Mapping[Tensor, int]
    layout: Layout
    ranks: int
    micro_batch_size: int
    sequence_length: int
    samples_per_step: int
    compiled: bool
    weight_dtype: torch.dtype | None = None
    float32_states: bool = False
    recomputation: Recomputation = "as configured"
    traces: dict[Any, Trace] = field(default_factory=dict)

    @property
    def accumulation(self) -> int:
        """Micro batches of a step on each rank."""
        return self.samples_per_step // (self.ranks * self.micro_batch_size)

    @property
    def module(self) -> nn.Module:
        """The model as a module."""
        return as_module(self.model)

    @property
    def blocks(self) -> list[nn.Module]:
        """The units of sharding."""
        return list(matching(self.module, self.model.parallel_plan().blocks).values())

    def traced(self) -> Trace:
        """One micro batch on the meta device."""
        chunk = getattr(self.loss, "chunk_tokens", None)
        key = self.micro_batch_size, self.recomputation, chunk
        if key not in self.traces:
            tokens = torch.empty(self.micro_batch_size, self.sequence_length, dtype=torch.int64, device="meta")
            dtype = None if self.layout.param_dtype == torch.float32 else self.layout.param_dtype
            model = _recomputed(self.model, self.recomputation)
            if not self.traces:
                # recomputation.budget measures in the first micro batch, which is no part of a step.
                trace(model, self.loss, Batch(tokens, tokens), dtype)
            self.traces[key] = trace(model, self.loss, Batch(tokens, tokens), dtype)
        return self.traces[key]


class Estimate(NamedTuple):
    """What a run takes on one device of many.

    memory: bytes on the rank that holds most.
    time: seconds of a step.
    tokens_per_second: of each device.
    mfu: share of the data sheet's bfloat16 peak, PaLM's convention.
    mfu_causal: the same without the attention that causality hides; None where the model does not tell.
    """

    memory: RankMemory
    time: StepTime
    tokens_per_second: float
    mfu: float
    mfu_causal: float | None


class Knob(NamedTuple):
    """A change of the configuration, and the run after it.

    change: in words.
    run: after it.
    estimate: of that.
    """

    change: str
    run: PlannedRun
    estimate: Estimate


def planned_run(
    executor: Executor,
    optimizer: torch.optim.Optimizer,
    micro_batch_size: int,
    sequence_length: int,
    samples_per_step: int,
) -> PlannedRun:
    """The run of objects that were built inside ``planning`` on the meta device.

    Args:
        executor: with model, loss and world.
        optimizer: of the model's parameters.
        micro_batch_size: samples that a rank computes at once.
        sequence_length: tokens of a sample.
        samples_per_step: over all ranks and micro batches.

    Raises:
        ConfigError: nothing would reduce the gradients over the ranks, or a part cannot be planned.
    """
    settings: Any = executor
    model, world = executor.model, settings.world
    world.check(model)
    sharding: Sharding | None = getattr(model, "sharding", None)
    asked = getattr(settings, "asked", "fp32")
    # What auto is going to be where the run is planned for: every device of the table multiplies bfloat16.
    precision = "bf16" if asked == "auto" and sharding is None else getattr(settings, "precision", asked)
    layout = Layout(1, 1, False, COMPUTING.get(precision, torch.bfloat16), torch.float32, False)
    if sharding is not None and precision == "fp32":
        layout = layout._replace(param_dtype=sharding.param_dtype)
    if sharding is not None and world.size > 1:
        layout = Layout(
            shards=world.degrees.dp_shard,
            replicas=world.degrees.dp_replicate,
            wrapped=True,
            param_dtype=sharding.param_dtype,
            reduce_dtype=sharding.reduce_dtype,
            reshard=sharding.reshard_after_forward,
        )
    return PlannedRun(
        model=model,
        loss=settings.loss,
        states=optimizer_states(optimizer),
        layout=layout,
        ranks=world.size,
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        samples_per_step=samples_per_step,
        compiled=getattr(settings, "compile", "none") != "none",
        weight_dtype=torch.bfloat16 if precision == "bf16_weights" else None,
        float32_states=getattr(optimizer, "state_dtype", None) == "fp32",
    )


def estimated(run: PlannedRun, device: Device) -> Estimate:
    """Memory and time of a run.

    Raises:
        ConfigError: the model does something that needs values, so that it cannot be traced.
    """
    try:
        traced = run.traced()
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{type(run.model).__name__} cannot be planned: a step of it needs values ({error})".splitlines()[0],
            hint="activations are found by running the model on the meta device, where tensors have shapes only",
            about=run.model,
        ) from error
    blocks = run.blocks
    held = rank_memory(run.module, blocks, run.states, traced, run.layout, run.accumulation, run.weight_dtype)
    micro_batch = compute_seconds(traced.operations, device, run.layout.param_dtype, run.compiled)
    time = step_time(run.module, blocks, micro_batch, run.accumulation, held, run.layout, device)
    speed = run.samples_per_step * run.sequence_length / time.total
    causal = getattr(run.model, "causal_flops_per_token", None)
    full = mfu(speed, run.model.flops_per_token(run.sequence_length), device.peak, run.ranks)
    assert full is not None
    return Estimate(
        memory=held,
        time=time,
        tokens_per_second=speed / run.ranks,
        mfu=full,
        mfu_causal=None if causal is None else mfu(speed, causal(run.sequence_length), device.peak, run.ranks),
    )


def knobs(run: PlannedRun, device: Device) -> list[Knob]:
    """What takes less memory, that which saves most first; only changes that save something."""
    now = estimated(run, device).memory.total
    found = [Knob(change, other, estimated(other, device)) for change, other in _changes(run)]
    found = [knob for knob in found if knob.estimate.memory.total < now]
    return sorted(found, key=lambda knob: knob.estimate.memory.total)


def way_to_fit(run: PlannedRun, device: Device, limit: float) -> list[Knob]:
    """Changes to make one after the other until the run fits, always the one that saves most; as far as they go.

    Args:
        run: that does not fit.
        device: it is planned for.
        limit: bytes of a device.
    """
    way: list[Knob] = []
    while not way or way[-1].estimate.memory.total > limit:
        some = knobs(way[-1].run if way else run, device)
        if not some:
            break
        way.append(some[0])
    return way


def _changes(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    layout = run.layout
    if run.micro_batch_size % 2 == 0:
        half = run.micro_batch_size // 2
        yield f"micro_batch_size: {half}", replace(run, micro_batch_size=half)
    recomputing = [hasattr(block, "recomputing") for block in run.blocks]
    if run.recomputation != "whole_blocks" and recomputing:
        yield "recomputation.blocks, around the model", replace(run, recomputation="whole_blocks")
    if run.recomputation == "as configured" and recomputing and not any(recomputing):
        yield "recomputation.selective, around the model", replace(run, recomputation="selective")
    if getattr(run.loss, "chunk_tokens", "auto") is None:
        chunked: Any = copy.copy(run.loss)
        chunked.chunk_tokens = "auto"
        yield "chunk_tokens: auto, for the loss", replace(run, loss=chunked)
    if run.float32_states:
        halved = {value: state // 2 for value, state in run.states.items()}
        yield "state_dtype: bf16, for the optimizer", replace(run, states=halved, float32_states=False)
    if layout.wrapped and not layout.reshard:
        yield "reshard_after_forward: true", replace(run, layout=layout._replace(reshard=True))
    if layout.replicas > 1:
        whole = layout._replace(replicas=1, shards=layout.shards * layout.replicas)
        yield "dp_replicate: 1", replace(run, layout=whole)
    if not layout.wrapped and run.weight_dtype is None and layout.param_dtype == torch.bfloat16:
        yield "precision: bf16_weights", replace(run, weight_dtype=torch.bfloat16)
    if layout.wrapped and run.samples_per_step % (2 * run.ranks * run.micro_batch_size) == 0:
        twice = layout._replace(shards=2 * layout.shards)
        yield f"{2 * run.ranks} devices", replace(run, ranks=2 * run.ranks, layout=twice)


def _recomputed(model: Model, recomputation: Recomputation) -> Model:
    """The model, or a copy of it that runs blocks again."""
    if recomputation == "as configured":
        return model
    other = copy.deepcopy(model)
    if recomputation == "selective":
        return selective(other)
    for block in matching(as_module(other), other.parallel_plan().blocks).values():
        if hasattr(block, "recomputing"):
            block.recomputation_contexts = None  # pyrefly: ignore[bad-argument-type]
        else:
            recompute(block)
    return other
