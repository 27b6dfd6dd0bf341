"""What would take less memory than a run does, and how much less."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from modalities_core.errors import ConfigError
from modalities_parallel.planning.devices import DEVICES_PER_NODE, Device
from modalities_parallel.planning.layout import Layout
from modalities_parallel.planning.refusals import refuse
from modalities_parallel.planning.run import Estimate, PlannedRun, estimated


class Knob(NamedTuple):
    """A change of the configuration, and the run after it.

    change: in words.
    run: after it.
    estimate: of that.
    """

    change: str
    run: PlannedRun
    estimate: Estimate


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
    d = layout.degrees
    if layout.replicas > 1:
        whole = d._replace(dp_replicate=1, dp_shard=d.dp_shard * d.dp_replicate)
        yield "dp_replicate: 1", replace(run, layout=layout._replace(degrees=whole))
    if layout.wrapped and layout.blocks_per_unit > 1:
        yield "blocks_per_unit: 1", replace(run, layout=layout._replace(blocks_per_unit=1))
    if layout.wrapped and layout.prefetch > 1:
        yield "prefetch: 1", replace(run, layout=layout._replace(prefetch=1))
    if layout.wrapped and not layout.offload:
        yield "offload: true", replace(run, layout=layout._replace(offload=True))
    yield from _axes(run)
    if not layout.wrapped and run.weight_dtype is None and layout.param_dtype == torch.bfloat16:
        yield "precision: bf16_weights", replace(run, weight_dtype=torch.bfloat16)
    if layout.wrapped and run.samples_per_step % (2 * run.data_ranks * run.micro_batch_size) == 0:
        twice = layout._replace(degrees=d._replace(dp_shard=2 * d.dp_shard))
        yield f"{2 * run.ranks} devices", replace(run, layout=twice)


def _axes(run: PlannedRun) -> Iterator[tuple[str, PlannedRun]]:
    """Twice as many ranks for tensor, context or pipeline parallelism, taken from those that see different data."""
    d = run.layout.degrees
    if not run.layout.wrapped or d.dp_shard % 2:
        return
    half = d._replace(dp_shard=d.dp_shard // 2)
    for axis, others in (("tp", half._replace(tp=2 * d.tp)), ("cp", half._replace(cp=2 * d.cp))):
        if axis == "tp" and others.tp > DEVICES_PER_NODE:
            continue  # between nodes it would wait most of the time
        if d.ep == 1 and _possible(run, run.layout._replace(degrees=others)):
            yield f"{axis}: {getattr(others, axis)}", replace(run, layout=run.layout._replace(degrees=others))
    # Without freeing, as in a pipeline weights would be gathered for every micro batch.
    deeper = run.layout._replace(degrees=half._replace(pp=2 * d.pp), reshard=run.layout.reshard and d.pp > 1)
    if d.ep == 1 and _possible(run, deeper):
        executor = "" if d.pp > 1 else ", with executor.pipeline"
        yield f"pp: {2 * d.pp}{executor}", replace(run, layout=deeper)


def _possible(run: PlannedRun, layout: Layout) -> bool:
    d = layout.degrees
    try:
        refuse(
            run.model,
            layout,
            run.sequence_length,
            run.samples_per_step // (d.dp_shard * d.dp_replicate * run.micro_batch_size),
        )
    except ConfigError:
        return False
    return True
