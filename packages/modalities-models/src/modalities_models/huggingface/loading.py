"""A folder of Hugging Face's as a decoder: its numbers, and its weights under our names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from modalities_core.errors import CheckpointError
from modalities_models.architecture import Architecture
from modalities_models.huggingface.families import read_architecture
from modalities_models.huggingface.family import EXECUTION, Family, canonical, shapes_of, unequal
from modalities_models.huggingface.files import Weights
from modalities_models.huggingface.settings import read_settings

NO_WEIGHTS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
"""Constants that old versions of transformers stored with the weights."""


class Checkpoint:
    """A folder with config.json and safetensors; nothing but the settings is read before it is asked for.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: it is no such folder, or describes no decoder of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = read_settings(folder)
        self.family: Family
        self.architecture: Architecture
        self.family, self.architecture = read_architecture(self.settings)

    def differences(self, architecture: Architecture) -> list[str]:
        """What another decoder has otherwise, where that changes what is computed from these weights.

        It may take shorter or longer sequences, as long as its positions are not learned.
        """
        ours, theirs = canonical(architecture), canonical(self.architecture)
        free = EXECUTION | ({"sequence_length"} if ours.positions != "absolute" else set())
        # Windows are compared as far as they reach in the sequences that are to be read.
        theirs = (
            canonical(replace(theirs, sequence_length=ours.sequence_length)) if "sequence_length" in free else theirs
        )
        return [
            f"{name} is {getattr(ours, name)}, there {getattr(theirs, name)}" for name in unequal(ours, theirs, free)
        ]

    def tensors(
        self, architecture: Architecture | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer of the decoder: name and whole value on the CPU, one at a time.

        Args:
            architecture: the same decoder with other rows of padding or another sequence length.
            dtype: of the values; by default as stored.

        Raises:
            CheckpointError: tensors are missing, left over, of another shape, or damaged.
        """
        a = architecture or self.architecture
        shapes = shapes_of(a)
        links = self.family.links(a, shapes)
        weights = Weights(self.folder)
        names = self.stored_names(weights)
        for link in links:
            for name, value in zip(
                link.ours, link.to_ours([weights.tensor(names[name]) for name in link.theirs]), strict=True
            ):
                if tuple(value.shape) != shapes[name]:
                    raise CheckpointError(
                        f"{self.folder}: {', '.join(link.theirs[:3])} gives {name} the shape {tuple(value.shape)}, "
                        f"but config.json means {shapes[name]}"
                    )
                yield name, value if dtype is None else value.to(dtype)

    def stored_names(self, weights: Weights) -> dict[str, str]:
        """Where each tensor of the model lies: under its name, or without the prefix of the headless model.

        Raises:
            CheckpointError: some are missing or left over.
        """
        links = self.family.links(self.architecture, shapes_of(self.architecture))
        wanted = [name for link in links for name in link.theirs]
        prefix = self.family.prefix
        bare = not any(name.startswith(prefix) for name in weights)
        names = {name: name.removeprefix(prefix) if bare else name for name in wanted}
        if missing := sorted(name for name, stored in names.items() if stored not in weights):
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors that its config.json asks for, such as {missing[0]}"
            )
        left = {name for name in weights if not NO_WEIGHTS.search(name)} - set(names.values())
        if self.architecture.tied_embeddings and "lm_head.weight" in left:
            self._check_tie(weights, names)
            left.discard("lm_head.weight")
        if left:
            raise CheckpointError(
                f"{self.folder} has {len(left)} tensors that a {self.family.class_name} of its config.json has not, "
                f"such as {min(left)}"
            )
        return names

    def _check_tie(self, weights: Weights, names: dict[str, str]) -> None:
        embedding = next(
            names[link.theirs[0]]
            for link in self.family.links(self.architecture, shapes_of(self.architecture))
            if link.ours == ("embedding.weight",)
        )
        if not torch.equal(weights.tensor(embedding), weights.tensor("lm_head.weight")):
            raise CheckpointError(
                f"{self.folder} has a head that differs from its embedding, but its config.json ties them",
                hint='set "tie_word_embeddings": false in a copy of its config.json if the head is right',
            )
