"""What of a planned run could not be built on the ranks that it is planned for."""

from __future__ import annotations

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.parameters import as_module
from modalities_core.training.plan import matching
from modalities_parallel import experts
from modalities_parallel.pipeline.schedules import check_micro_batches, check_stages
from modalities_parallel.planning.layout import Layout, rank_parts, split_layers
from modalities_parallel.tensor import refusals


def refuse(model: Model, layout: Layout, sequence_length: int, micro_batches: int) -> None:
    """Raise ConfigError where parallel.fsdp2 or the executor would, or the first step.

    Args:
        model: whole, on the meta device.
        layout: of its tensors.
        sequence_length: tokens of a sample.
        micro_batches: of a step on each data-parallel rank.
    """
    module, plan, d = as_module(model), model.parallel_plan(), layout.degrees
    if d.tp > 1 or d.cp > 1:
        refusals.refuse(module, plan, split_layers(module, plan), d, None)
        if sequence_length % (d.cp * d.tp):
            raise ConfigError(
                f"samples of {sequence_length} tokens cannot be cut into cp {d.cp} x tp {d.tp} = {d.cp * d.tp} equal "
                "parts",
                hint=f"take a sequence length that {d.cp * d.tp} divides",
            )
    if d.ep > 1:
        experts.refuse(module, plan, matching(module, plan.experts), d)
    if d.pp > 1:
        check_stages(layout.schedule, layout.stages_per_rank, None)
        check_micro_batches(layout.schedule, micro_batches, d.pp, None)
        _refuse_tied(module, model)
    rank_parts(model, layout)


def _refuse_tied(module: object, model: Model) -> None:
    if next(model.head.parameters(), None) is None:
        raise ConfigError(
            f"the output head of {type(module).__name__} is tied to the embedding, which is on another rank of a "
            "pipeline",
            hint="untie them (tied_embeddings: false for model.decoder), or set pp of world.auto to 1",
            about=model,
        )
