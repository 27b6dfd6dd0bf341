"""Tensor and context parallelism applied to a model."""

from __future__ import annotations

from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_parallel.mesh import Meshes


def split(model: nn.Module, plan: ParallelPlan, meshes: Meshes, *, component: object = None) -> None:
    """Leave this rank's parts of what ``plan`` names in ``model``, in place."""
    raise ConfigError("tp and cp have to be 1", about=(component, "world"))
