"""Batches of tensors: for training, as functions of the step, and for evaluation."""

from __future__ import annotations

from modalities_data.loading.held_out import HeldOutBatches
from modalities_data.loading.steps import InOrderBatches, ShuffledBatches

__all__ = ["HeldOutBatches", "InOrderBatches", "ShuffledBatches"]
