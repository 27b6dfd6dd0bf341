"""A run on devices that are not there, and what it takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Executor, Loss, Model
from modalities_core.training.parameters import as_module
from modalities_core.training.plan import matching
from modalities_core.training.throughput import mfu
from modalities_parallel.mesh import Degrees
from modalities_parallel.planning.devices import Device
from modalities_parallel.planning.layout import Layout, rank_parts
from modalities_parallel.planning.memory import RankMemory, optimizer_states, rank_memory, stored_bytes
from modalities_parallel.planning.refusals import refuse
from modalities_parallel.planning.split import StepShape, rank_share
from modalities_parallel.planning.timing import StepTime, compute_seconds, step_time
from modalities_parallel.planning.trace import Trace, trace
from modalities_parallel.planning.traffic import Traffic, watched
from modalities_parallel.recomputation import selective
from modalities_parallel.recomputed import recompute
from modalities_parallel.sharding_settings import Sharding

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
    micro_batch_size: int
    sequence_length: int
    samples_per_step: int
    compiled: bool
    weight_dtype: torch.dtype | None = None
    float32_states: bool = False
    recomputation: Recomputation = "as configured"
    traces: dict[Any, tuple[Trace, Traffic]] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.layout.degrees.ranks

    @property
    def data_ranks(self) -> int:
        """Those that see different data."""
        return self.layout.degrees.dp_replicate * self.layout.degrees.dp_shard

    @property
    def accumulation(self) -> int:
        """Micro batches of a step on each rank."""
        return self.samples_per_step // (self.data_ranks * self.micro_batch_size)

    @property
    def module(self) -> nn.Module:
        """The model as a module."""
        return as_module(self.model)

    @property
    def blocks(self) -> list[nn.Module]:
        """The units of sharding."""
        return list(matching(self.module, self.model.parallel_plan().blocks).values())

    @property
    def steps(self) -> StepShape:
        """What of a step decides what is held at once."""
        recomputed = self.recomputation != "as configured" or any(hasattr(one, "recomputing") for one in self.blocks)
        return StepShape(self.accumulation, recomputed, getattr(self.loss, "chunk_tokens", "auto") is None)

    def traced(self) -> Trace:
        """One micro batch on the meta device, in one process."""
        return self.seen()[0]

    def seen(self) -> tuple[Trace, Traffic]:
        """The same, and what its modules pass on."""
        chunk = getattr(self.loss, "chunk_tokens", None)
        key = self.micro_batch_size, self.recomputation, chunk
        if key not in self.traces:
            tokens = torch.empty(self.micro_batch_size, self.sequence_length, dtype=torch.int64, device="meta")
            dtype = None if self.layout.param_dtype == torch.float32 else self.layout.param_dtype
            model = _recomputed(self.model, self.recomputation)
            if not self.traces:
                # recomputation.budget measures in the first micro batch, which is no part of a step.
                trace(model, self.loss, Batch(tokens, tokens), dtype)
            with watched(model) as watch:
                found = trace(model, self.loss, Batch(tokens, tokens), dtype)
            self.traces[key] = found, watch.traffic()
        return self.traces[key]


class Estimate(NamedTuple):
    """What a run takes on one device of many.

    memory: bytes on the rank that holds most.
    time: seconds of a step.
    tokens_per_second: of each device.
    mfu: share of the data sheet's bfloat16 peak, PaLM's convention.
    mfu_causal: the same without the attention that causality hides; None where the model does not tell.
    host: bytes of the host's memory for each device, where weights, gradients and optimizer are offloaded.
    """

    memory: RankMemory
    time: StepTime
    tokens_per_second: float
    mfu: float
    mfu_causal: float | None
    host: int


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
    layout = Layout(Degrees(), False, COMPUTING.get(precision, torch.bfloat16), torch.float32, False)
    if sharding is not None and precision == "fp32":
        layout = layout._replace(param_dtype=sharding.param_dtype)
    if sharding is not None and world.size > 1:
        layout = Layout(
            world.degrees,
            True,
            sharding.param_dtype,
            sharding.reduce_dtype,
            sharding.reshard_after_forward,
            sharding.blocks_per_unit,
            sharding.prefetch,
            sharding.offload,
            sharding.stages_per_rank,
            getattr(settings, "schedule", "1f1b"),
        )
        refuse(model, layout, sequence_length, samples_per_step // (world.data_size * micro_batch_size))
    return PlannedRun(
        model=model,
        loss=settings.loss,
        states=optimizer_states(optimizer),
        layout=layout,
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
        traced, traffic = run.seen()
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{type(run.model).__name__} cannot be planned: a step of it needs values ({error})".splitlines()[0],
            hint="activations are found by running the model on the meta device, where tensors have shapes only",
            about=run.model,
        ) from error
    blocks, steps, layout = len(run.blocks), run.steps, run.layout
    micro_batch = compute_seconds(traced.operations, device, layout.param_dtype, run.compiled)
    memories, times = [], []
    for part in rank_parts(run.model, layout):
        share = rank_share(traced, traffic, layout, part, blocks, steps)
        held = rank_memory(run.module, part, run.states, share, layout, run.accumulation, run.weight_dtype)
        stored = stored_bytes(part, run.states, run.weight_dtype)
        memories.append((held, sum(stored) if layout.offload else 0))
        times.append(step_time(part, micro_batch, blocks, traffic, steps, held, stored, layout, device))
    fullest, host = max(memories, key=lambda one: one[0].total)
    time = max(times, key=lambda one: one.total)
    speed = run.samples_per_step * run.sequence_length / time.total
    causal = getattr(run.model, "causal_flops_per_token", None)
    full = mfu(speed, run.model.flops_per_token(run.sequence_length), device.peak, run.ranks)
    assert full is not None
    return Estimate(
        memory=fullest,
        time=time,
        tokens_per_second=speed / run.ranks,
        mfu=full,
        mfu_causal=None if causal is None else mfu(speed, causal(run.sequence_length), device.peak, run.ranks),
        host=host,
    )


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
