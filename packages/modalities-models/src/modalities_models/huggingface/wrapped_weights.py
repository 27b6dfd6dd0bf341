"""Weights of a folder for a class of transformers, under the names of its own parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modalities_core.errors import CheckpointError, first_line
from modalities_models.huggingface.files import Weights
from modalities_models.huggingface.loading import NO_WEIGHTS
from modalities_models.huggingface.wrapped_head import base_name


class FolderWeights:
    """What a folder holds for a causal language model; only headers are read before values are asked for.

    Where the folder names its tensors as the class does, each is read when its turn comes. Where it does not (experts
    one by one, older names), transformers itself converts them, with the whole model in memory for that time.

    Args:
        folder: with config.json and safetensors.
        network: a model of the class and config, on the meta device.
        tied: names of parameters that are read from another one, which the folder may hold or not.

    Raises:
        CheckpointError: the folder holds no safetensors, or tensors of another shape.
    """

    def __init__(self, folder: Path, network: nn.Module, tied: frozenset[str]) -> None:
        self.folder = folder
        self._network = type(network)
        self._config: Any = network.config
        self._wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        self._ignored = tuple(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ())
        self._tied = tied
        self._prefix = f"{base_name(network)}."
        self.names = self._own_names(Weights(folder))
        """Where each tensor of the class lies; None where transformers has to convert them."""

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole value of every parameter and persistent buffer, float32 on the CPU.

        Raises:
            CheckpointError: tensors are missing, left over, of another shape, or damaged.
        """
        if self.names is None:
            yield from self._converted()
            return
        weights = Weights(self.folder)
        for name, stored in self.names.items():
            value = weights.tensor(stored)
            yield name, value.float() if value.is_floating_point() else value

    def _own_names(self, weights: Weights) -> dict[str, str] | None:
        bare = not any(name.startswith(self._prefix) for name in weights)
        names = {name: name.removeprefix(self._prefix) if bare else name for name in self._wanted}
        if any(stored not in weights for stored in names.values()):
            return None
        for name, stored in names.items():
            if (found := weights.info(stored).shape) != self._wanted[name]:
                raise CheckpointError(
                    f"{self.folder}: {stored} has the shape {found}, its config means {self._wanted[name]}",
                    hint="`config` may change only what the weights do not depend on",
                )
        self._refuse_left(set(weights) - set(names.values()))
        return names

    def _refuse_left(self, left: set[str]) -> None:
        harmless = re.compile("|".join((NO_WEIGHTS.pattern, *self._ignored)))
        tied = self._tied | {name.removeprefix(self._prefix) for name in self._tied}
        if left := {name for name in left - tied if not harmless.search(name)}:
            raise CheckpointError(
                f"{self.folder} has {len(left)} tensors that a {self._network.__name__} of its config has not, such as "
                f"{min(left)}"
            )

    def _converted(self) -> Iterator[tuple[str, Tensor]]:
        try:
            network, report = self._network.from_pretrained(  # pyrefly: ignore[missing-attribute]
                self.folder,
                config=self._config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever a library of models makes of a folder it does not like
            reason = first_line(error)
            raise CheckpointError(f"transformers does not load {self.folder}: {reason}") from error
        if missing := sorted(set(report["missing_keys"]) - self._tied):
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors that its config asks for, such as {missing[0]}"
            )
        self._refuse_left(set(report["unexpected_keys"]))
        tensors = network.state_dict()
        for name in self._wanted:
            yield name, tensors[name].detach().float()
