"""Losses: hidden states and the output head to a weighted sum over tokens."""

from modalities_models.losses.cross_entropy import CrossEntropy
from modalities_models.losses.liger import LigerCrossEntropy

__all__ = ["CrossEntropy", "LigerCrossEntropy"]
