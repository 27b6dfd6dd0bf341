"""Expert parallelism applied to a model."""

from __future__ import annotations

from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_parallel.mesh import Meshes


def spread(model: nn.Module, plan: ParallelPlan, meshes: Meshes, *, component: object = None) -> list[nn.Module]:
    """Leave this rank's experts in the modules that ``plan`` names, in place; returns these modules."""
    raise ConfigError("ep has to be 1", about=(component, "world"))
