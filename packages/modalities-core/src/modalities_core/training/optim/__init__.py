"""Optimizers, their parameter groups and what can be set on them during a run."""

from modalities_core.training.optim.adam import adam, adamw
from modalities_core.training.optim.groups import NO_DECAY, ParameterGroup
from modalities_core.training.optim.lion import lion
from modalities_core.training.optim.muon import muon
from modalities_core.training.optim.settings import (
    hyperparameters,
    learning_rates,
    restore_hyperparameters,
    set_learning_rates,
)
from modalities_core.training.optim.sgd import sgd

__all__ = [
    "NO_DECAY",
    "ParameterGroup",
    "adam",
    "adamw",
    "hyperparameters",
    "learning_rates",
    "lion",
    "muon",
    "restore_hyperparameters",
    "set_learning_rates",
    "sgd",
]
