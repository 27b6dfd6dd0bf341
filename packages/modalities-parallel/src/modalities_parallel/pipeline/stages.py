"""The part of a model that a rank of a pipeline holds."""

from __future__ import annotations

from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_parallel.mesh import Meshes


def keep_stages(
    model: nn.Module, plan: ParallelPlan, meshes: Meshes, stages_per_rank: int, *, component: object = None
) -> None:
    """Drop the blocks of other ranks' stages from ``model``, in place."""
    raise ConfigError("pp has to be 1", about=(component, "world"))
