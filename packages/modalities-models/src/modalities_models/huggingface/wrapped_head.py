"""The output head of a causal language model of transformers: all that its class does behind its base model.

The class itself says what that is: its own forward runs with a base model that gives back the hidden states it was
handed. Where it turns out to be no more than a matrix, a factor and a soft cap, a loss may compute it piece by piece.

Shape suffixes: N tokens, D hidden size, V vocabulary size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_models.head import Head, TiedHead

SAMPLES = 3


class _Outputs:
    """What a base model gives back: hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, key: int | str) -> Tensor:
        if key in (0, "last_hidden_state"):
            return self.last_hidden_state
        raise IndexError(key)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return


class _GivenHidden(nn.Module):
    """Stands for a base model whose hidden states are known; it has the other's constants."""

    hidden: Tensor | None = None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)

    def __getattr__(self, name: str) -> Any:
        """What is asked of the base model besides its hidden states, such as a factor."""
        if name == "_base":
            raise AttributeError(name)
        return getattr(self._base[0], name)

    @property
    def decoder(self) -> _GivenHidden:
        """Itself, for classes that call a part of their base model."""
        return self

    def forward(self, *_arguments: Any, **_keywords: Any) -> Any:
        """Those hidden states."""
        assert self.hidden is not None
        return _Outputs(self.hidden)


class _GivenLogits(nn.Module):
    """Stands for an output matrix, and notes what it is multiplied with."""

    def __init__(self, weight: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.logits = logits
        self.matrix = (weight,)

    @property
    def weight(self) -> Tensor:
        """Of the matrix, for its dtype."""
        return self.matrix[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits that it was made with."""
        self.seen.append(hidden)
        return self.logits


class ClassHead(nn.Module):
    """Hidden states (..., D) to logits (..., V) by the class's own forward, whatever it does.

    Owns no parameter: it reads those of the network, so it stays right through sharding and casting.

    Args:
        network: a causal language model of transformers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        base = base_name(network)
        self._given = _GivenHidden(network.get_submodule(base))
        self._network = (_with_parts(network, **{base: self._given}),)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to logits (..., V)."""
        self._given.hidden = hidden.reshape(1, -1, hidden.shape[-1])
        tokens_1N = torch.zeros(self._given.hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        try:
            # Not called as a module: hooks of whoever wrapped the network belong to its own forward.
            logits_1NV = self._network[0].forward(input_ids=tokens_1N, use_cache=False, return_dict=True).logits
        finally:
            self._given.hidden = None
        return logits_1NV.reshape(*hidden.shape[:-1], logits_1NV.shape[-1])


def base_name(network: nn.Module) -> str:
    """The part of a causal language model that gives hidden states.

    Raises:
        ConfigError: no part of it is a model of its own.
    """
    from transformers import PreTrainedModel

    parts = [name for name, part in network.named_children() if isinstance(part, PreTrainedModel)]
    declared = cast(Any, network).base_model_prefix
    if declared not in parts and len(parts) != 1:
        raise ConfigError(f"{type(network).__name__} cannot be wrapped: it has no base model apart from its head")
    return declared if declared in parts else parts[0]


def head_of(network: nn.Module) -> nn.Module:
    """What turns hidden states of the base model into logits.

    Args:
        network: a causal language model of transformers, on any device, also without memory.

    Raises:
        ConfigError: its class does something else behind its base model.
    """
    output = cast(Any, network).get_output_embeddings()
    kind = type(network).__name__
    weight = getattr(output, "weight", None)
    if weight is None or weight.ndim != 2:
        raise ConfigError(f"{kind} has no output matrix, so it cannot be trained as a language model")
    plain = isinstance(output, Head | nn.Linear) and getattr(output, "bias", None) is None
    factors = _factors(network, output) if plain else None
    if factors is not None:
        return TiedHead(cast(nn.Embedding, output), weight.shape[0], *factors)
    head = ClassHead(network)
    hidden = torch.empty(SAMPLES, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            logits = head(hidden)
    except Exception as error:  # whatever a class of any kind makes of hidden states it did not compute
        raise ConfigError(
            f"{kind} cannot be wrapped: its logits do not follow from the hidden states of its base model ({error})"
        ) from error
    if logits.shape != (SAMPLES, weight.shape[0]):
        raise ConfigError(f"{kind} cannot be wrapped: for {SAMPLES} tokens it gives logits {tuple(logits.shape)}")
    return head


@torch.no_grad()
def _factors(network: nn.Module, output: nn.Module) -> tuple[float, float | None] | None:
    """Factor on the logits and soft cap, if that is all that the class does, to the last bit; else None."""
    weight = cast(Tensor, output.weight)
    name = next((name for name, part in network.named_children() if part is output), None)
    if name is None:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    # So wide that a soft cap shows.
    logits = 100 * torch.randn(1, SAMPLES, weight.shape[0], generator=generator, device="cpu")
    hidden = torch.randn(1, SAMPLES, weight.shape[1], generator=generator, device="cpu")
    given = _GivenLogits(weight, logits.clone())
    head = ClassHead(_with_parts(network, **{name: given}))
    try:
        with torch.device("cpu"):
            found = head(hidden)
    except Exception:  # then the class decides with its own matrix whether it can be wrapped
        return None
    if len(given.seen) != 1 or not torch.equal(given.seen[0].reshape(hidden.shape), hidden):
        return None
    return next((pair for pair, made in _candidates(network, logits) if torch.equal(made, found)), None)


def _candidates(network: nn.Module, logits: Tensor) -> Iterator[tuple[tuple[float, float | None], Tensor]]:
    """Factor, soft cap and their result, for every number in the config that could be one."""
    yield (1.0, None), logits
    values = cast(Any, network).config.to_dict().values()
    for value in {float(value) for value in values if isinstance(value, int | float) and value}:
        yield (value, None), logits * value
        yield (1 / value, None), logits / value
        yield (1.0, value), torch.tanh(logits / value) * value


def _with_parts(network: nn.Module, **parts: nn.Module) -> nn.Module:
    """The same module, sharing everything but these direct parts of it."""
    changed = copy.copy(network)
    changed._modules = {**network._modules, **parts}
    return changed
