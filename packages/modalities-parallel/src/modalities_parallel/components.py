"""The components of this package, as strings so that listing them imports nothing."""

from __future__ import annotations

COMPONENTS: dict[str, str] = {
    "checkpoint_format.sharded": "modalities_parallel.checkpoint.sharded:Sharded",
    "executor.pipeline": "modalities_parallel.pipeline.executor:Pipeline",
    "parallel.fsdp2": "modalities_parallel.fsdp:fsdp2",
    "precision.float8": "modalities_parallel.float8:float8",
    "recomputation.blocks": "modalities_parallel.recomputation:whole_blocks",
    "recomputation.budget": "modalities_parallel.recomputation_budget:budget",
    "recomputation.selective": "modalities_parallel.recomputation:selective",
    "world.auto": "modalities_parallel.world:auto",
}
