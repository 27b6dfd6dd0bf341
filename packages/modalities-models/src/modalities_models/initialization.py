"""Initial values of parameters: a pure function of (seed, parameter name), whatever the device, order or sharding.

An initialization fills weight matrices by the part they play in the model. Norm scales are always one and biases
always zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_models.architecture import Architecture

Kind = Literal["embedding", "position", "projection", "residual", "router", "head", "scale", "bias"]


@dataclass(frozen=True, slots=True)
class Role:
    """The part a parameter plays.

    Args:
        kind: token embedding, position embedding, projection inside a block, projection that writes to the residual
            stream, product that gates or routes to other parts, output head, norm scale, or bias.
        layer: number of its block, from 1; 0 outside of blocks.
        layers: blocks in the model.
    """

    kind: Kind
    layer: int = 0
    layers: int = 0


@runtime_checkable
class Initialization(Protocol):
    """Fills weight matrices. Must use no randomness but the generator's."""

    def __call__(self, values: Tensor, role: Role, generator: torch.Generator) -> None:
        """Fill ``values``, a float32 CPU tensor (out, in), in place; ``role`` is never a scale or a bias.

        The matrices of several experts come one by one.
        """
        ...


@runtime_checkable
class GivenWeights(Protocol):
    """Gives the values of one decoder by name, such as those of a checkpoint, instead of filling them by role."""

    def check(self, architecture: Architecture) -> None:
        """Raise ConfigError unless the values are those of a decoder of these numbers; reads no tensor."""
        ...

    def values(self, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's and buffer's name and whole value, float32 on the CPU; the same on every rank."""
        ...


class Plain:
    """Every weight from a normal distribution with mean 0 and the same standard deviation.

    Args:
        std: standard deviation.
    """

    def __init__(self, std: float = 0.02) -> None:
        self.std = _positive("std", std)

    def __call__(self, values: Tensor, role: Role, generator: torch.Generator) -> None:
        """Fill ``values`` in place."""
        values.normal_(0.0, self.std, generator=generator)


class Scaled:
    """Normal, with projections into the residual stream divided by sqrt(2 * layers), so that its variance stays.

    The scheme of GPT-2 (Radford et al. 2019, section 2.3: a factor of 1/sqrt(N) for N residual layers, two a block).

    Args:
        std: standard deviation of all other weights.
    """

    def __init__(self, std: float = 0.02) -> None:
        self.std = _positive("std", std)

    def __call__(self, values: Tensor, role: Role, generator: torch.Generator) -> None:
        """Fill ``values`` in place."""
        factor = (2 * role.layers) ** -0.5 if role.kind == "residual" else 1.0
        values.normal_(0.0, self.std * factor, generator=generator)


class Llama:
    """Truncated normal, with projections into the residual stream shrinking with depth.

    No weight starts as an outlier: values beyond ``cutoff`` standard deviations are drawn again, as in OLMo 2
    (arXiv:2501.00656, section 3.2: std 0.02, cut at 3). A projection into the residual stream of block l (from 1) is
    divided by sqrt(2 * l) (depth-scaled initialization, arXiv:1908.11365, applied to its two residual layers). The
    head has standard deviation 1 / sqrt(hidden size), for logits of variance near one.

    Args:
        std: standard deviation of all other weights, before truncation.
        cutoff: largest magnitude, in standard deviations.
    """

    def __init__(self, std: float = 0.02, cutoff: float = 3.0) -> None:
        self.std = _positive("std", std)
        self.cutoff = _positive("cutoff", cutoff)

    def __call__(self, values: Tensor, role: Role, generator: torch.Generator) -> None:
        """Fill ``values`` in place."""
        std = self.std
        if role.kind == "residual":
            std /= math.sqrt(2 * role.layer)
        elif role.kind == "head":
            std = values.shape[-1] ** -0.5
        nn.init.trunc_normal_(values, 0.0, std, -self.cutoff * std, self.cutoff * std, generator=generator)


def initial_value(name: str, shape: tuple[int, ...], role: Role, initialization: Initialization, seed: int) -> Tensor:
    """One parameter's whole initial value, float32 on the CPU: the same for the same arguments, anywhere.

    Args:
        name: the parameter's qualified name; its random stream depends on it.
        shape: of the whole parameter; of three dimensions the first counts experts, each with a random stream of
            its own.
        role: what it is for.
        initialization: how weight matrices are filled.
        seed: of the model.
    """
    if role.kind == "scale":
        return torch.ones(shape, dtype=torch.float32, device="cpu")
    if role.kind == "bias":
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        if len(shape) == 3:
            for expert, matrix in enumerate(values):
                initialization(matrix, role, generator_for(seed, f"{name}.{expert}"))
        else:
            initialization(values, role, generator_for(seed, name))
    return values


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU random stream of its own for every (seed, name), the same in every process."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name} must be positive and finite, not {value}", about=(None, name))
    return value
