"""What a family of Hugging Face models is to us: its settings, its tensors, and which decoders it can express."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modalities_models.architecture import Architecture
from modalities_models.huggingface.links import Link, Padded, Same
from modalities_models.huggingface.rope import plain
from modalities_models.huggingface.settings import Settings
from modalities_models.nn.mixture_of_experts import MixtureOfExperts

Shapes = Mapping[str, tuple[int, ...]]
"""Name and whole shape of every tensor of ours."""

EXECUTION = frozenset({"attention", "dropout", "vocab_multiple"})
"""Fields that do not change what a model computes outside of training."""


@dataclass(frozen=True, slots=True)
class Family:
    """One stock class of transformers.

    Args:
        model_type: as in config.json.
        class_name: of the model with its head.
        read: a decoder's numbers from its settings; CheckpointError where there is no such decoder.
        write: settings from a decoder's numbers, as near as the family comes to it.
        links: where our tensors lie in its checkpoints.
        prefix: of the names inside of the headless model.
    """

    model_type: str
    class_name: str
    read: Callable[[Settings], Architecture]
    write: Callable[[Architecture], dict[str, Any]]
    links: Callable[[Architecture, Shapes], list[Link]]
    prefix: str = "model."

    def differences(self, architecture: Architecture) -> list[str]:
        """What is lost when this family has to express a decoder; empty where it can.

        The decoder's numbers are written as settings and read back: what comes back otherwise, it has no way to say.

        Raises:
            ModalitiesError: it has no way to say nearly anything of it.
        """
        back = self.read(Settings(self.write(architecture), Path(f"{self.model_type}'s config.json")))
        wanted, got = canonical(architecture), canonical(back)
        return [
            clause
            for name in unequal(wanted, got, EXECUTION)
            for clause in _clauses(name, getattr(wanted, name), getattr(got, name))
        ]


@dataclass(frozen=True, slots=True)
class Names:
    """How a family names what ours names otherwise.

    Args:
        outer: modules outside of the blocks.
        inner: modules inside of a block.
        block: prefix of a block's modules, with {} for its number.
        scale: the link of norm scales.
        matrix: the link of matrices inside of a block.
    """

    outer: Mapping[str, str]
    inner: Mapping[str, str]
    block: str = "model.layers.{}."
    scale: type[Same] = Same
    matrix: type[Same] = Same

    def link(self, name: str, architecture: Architecture) -> Link | None:
        """The link of one tensor of ours that has one name in theirs, or None where its module is not in the table."""
        inside = name.startswith("blocks.")
        number, _, local = name.removeprefix("blocks.").partition(".") if inside else ("", "", name)
        module, _, leaf = local.rpartition(".")
        table = self.inner if inside else self.outer
        if module not in table:
            return None
        their = f"{self.block.format(number) if inside else ''}{table[module]}.{leaf}"
        a = architecture
        if module in ("embedding", "head") and a.stored_vocab_size != a.vocab_size:
            return Padded(name, their, a.vocab_size, a.stored_vocab_size)
        if leaf != "weight" or not inside:
            return (self.scale if module == "norm" and leaf == "weight" else Same)(name, their)
        return (self.scale if module.endswith("norm") else self.matrix)(name, their)


def renamed(architecture: Architecture, shapes: Shapes, names: Names, others: Iterable[Link] = ()) -> list[Link]:
    """Links of all tensors of ours: those of ``others``, and for the rest one name each."""
    links = list(others)
    linked = {name for link in links for name in link.ours}
    for name in shapes:
        if name not in linked:
            link = names.link(name, architecture)
            assert link is not None, f"{name} has no name in this family"
            links.append(link)
    return links


def shapes_of(architecture: Architecture) -> Shapes:
    """Name and whole shape of every parameter and buffer that a decoder keeps, without making any."""
    from modalities_models.decoder import Decoder
    from modalities_models.initialization import Scaled

    with torch.device("meta"):
        model = Decoder(architecture, Scaled())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def canonical(architecture: Architecture) -> Architecture:
    """The same decoder in the one of several spellings that we compare by."""
    a = architecture
    theta, scaling = plain(a)
    feedforward, inner = a.feedforward, a.intermediate_size
    if isinstance(feedforward, MixtureOfExperts):
        layers = tuple(sorted({*feedforward.dense_layers}))
        feedforward = replace(feedforward, balance_rate=1e-3 if feedforward.balance_rate else 0.0, dense_layers=layers)
        # Without a dense layer this number is nowhere.
        inner = inner if layers else feedforward.intermediate_size
    return replace(
        a,
        feedforward=feedforward,
        intermediate_size=inner,
        attention_windows=shortest([_felt(a.window(layer), a) for layer in range(a.layers)]),
        attention_scale=a.head_size**-0.5 if a.attention_scale is None else a.attention_scale,
        query_key_value_bias=a.has_query_key_value_bias,
        rope_theta=theta if a.positions == "rope" else 10_000.0,
        rope_scaling=scaling,
    )


def unequal(one: Architecture, other: Architecture, free: Collection[str]) -> list[str]:
    """Fields in which two canonical decoders differ, but for rounding, other than the ``free`` ones."""
    names = [item.name for item in fields(Architecture) if item.name not in free]
    return [name for name in names if not _equal(getattr(one, name), getattr(other, name))]


def shortest(windows: list[int | None]) -> tuple[int | None, ...]:
    """The shortest pattern that repeats to these windows, one per layer."""
    for length in range(1, len(windows) + 1):
        if all(window == windows[layer % length] for layer, window in enumerate(windows)):
            return tuple(windows[:length])
    raise AssertionError("a decoder has layers")


def layer_pattern(settings: Settings, layers: int, window: int | None, default: Callable[[int], bool]) -> tuple:
    """Windows from ``layer_types``, or from a rule where a config does not spell them out.

    Args:
        settings: to take ``layer_types`` from.
        layers: how many there are.
        window: of the layers that have one.
        default: whether the layer of this number, from 0, has a window.
    """
    types = settings.take("layer_types", list, None)
    if types is None:
        types = ["sliding_attention" if default(layer) else "full_attention" for layer in range(layers)]
    known = {"sliding_attention": window, "full_attention": None}
    if len(types) != layers or not set(types) <= set(known):
        raise settings.refusal("layer_types", f"it has to give full_attention or sliding_attention {layers} times")
    return shortest([known[kind] for kind in types])


def _felt(window: int | None, a: Architecture) -> int | None:
    return None if window is None or window >= a.sequence_length else window


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other


def _clauses(name: str, wanted: Any, got: Any) -> list[str]:
    """What of a field is lost: of two objects of one kind, only the arguments that differ."""
    if is_dataclass(wanted) and type(wanted) is type(got):
        pairs = [
            (f"{name}.{item.name}", getattr(wanted, item.name), getattr(got, item.name)) for item in fields(wanted)
        ]
    else:
        pairs = [(name, wanted, got)]
    return [f"{name} {_words(one)} (it has {_words(other)})" for name, one, other in pairs if not _equal(one, other)]


def _words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
