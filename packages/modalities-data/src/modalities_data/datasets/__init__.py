"""Datasets: fixed, indexable sets of equally long samples, without torch."""

from __future__ import annotations

from modalities_data.datasets.best_fit import BestFitDataset
from modalities_data.datasets.image_text import ImageTextDataset
from modalities_data.datasets.memory import InMemoryDataset, LoremIpsumDataset
from modalities_data.datasets.mixture import MixtureDataset
from modalities_data.datasets.packed import PackedDataset
from modalities_data.datasets.part import PartDataset

__all__ = [
    "BestFitDataset",
    "ImageTextDataset",
    "InMemoryDataset",
    "LoremIpsumDataset",
    "MixtureDataset",
    "PackedDataset",
    "PartDataset",
]
