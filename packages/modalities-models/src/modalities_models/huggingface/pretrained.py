"""Starting from the weights of a Hugging Face checkpoint instead of random ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modalities_core.errors import ConfigError
from modalities_models.architecture import Architecture
from modalities_models.decoder import Decoder
from modalities_models.huggingface.loading import Checkpoint


class Pretrained:
    """Starts from trained weights: a folder of Hugging Face's with config.json and safetensors.

    The settings of the model have to be those of its config.json; only sequence_length (unless positions are learned),
    dropout, the implementation of attention and the rows of padding are free. ``model.pretrained`` takes them all from
    there. Weights are read tensor by tensor when the model gets its values, on every rank, so the folder has to be
    visible to all.

    Args:
        path: the folder; weights as pickles (pytorch_model.bin) are refused.

    Raises:
        CheckpointError: it is no such folder, or of a family that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = Checkpoint(path)

    def check(self, architecture: Architecture) -> None:
        """Make sure that these weights belong to a decoder.

        Raises:
            ConfigError: they belong to another; it names every number that differs.
        """
        if differences := self.checkpoint.differences(architecture):
            raise ConfigError(
                f"the weights in {self.path} belong to another decoder: {'; '.join(differences)}",
                hint="component model.pretrained takes every number from its config.json",
                about=(self, "path"),
            )

    def values(self, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
        """Name and whole value of every parameter and buffer, float32 on the CPU."""
        return self.checkpoint.tensors(architecture, torch.float32)


def pretrained(
    path: Path,
    sequence_length: int | None = None,
    dropout: float | None = None,
    attention: Literal["auto", "sdpa", "flash", "flex"] = "auto",
    vocab_multiple: int = 1,
) -> Decoder:
    """The decoder of a Hugging Face checkpoint with its weights, to be trained on.

    Args:
        path: a folder of Hugging Face's with config.json and safetensors.
        sequence_length: longest input in tokens; default that of its config.json.
        dropout: probability, on embeddings, attention weights and residual outputs, in training only; default that of
            its config.json.
        attention: the implementation; auto takes the fastest there is.
        vocab_multiple: rows of embedding and head are stored rounded up to a multiple of this.

    Raises:
        CheckpointError: there is no such folder, its weights are pickles, missing or damaged, or it is of a family or
            has a setting that this decoder does not cover.
        ConfigError: a number is impossible.
    """
    weights = Pretrained(path)
    architecture = weights.checkpoint.architecture
    changes: dict[str, Any] = {"attention": attention, "vocab_multiple": vocab_multiple}
    if sequence_length is not None:
        changes["sequence_length"] = sequence_length
    if dropout is not None:
        changes["dropout"] = dropout
    return Decoder(replace(architecture, **changes), weights)
