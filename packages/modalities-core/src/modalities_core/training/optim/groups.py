"""Which parameters share a learning rate, a weight decay and the like, chosen by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.parameters import trainable, whole

NO_DECAY = ("*norm*", "*ln_*", "*bias", "*embed*", "*wte*", "*wpe*", "*positions*", "*log_scale")
"""Names of norms, biases, embeddings and single factors, which weight decay would only shrink."""

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: value > 0, "positive"),
    "adamw_lr": (lambda value: value > 0, "positive"),
    "betas": (lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)"),
    "eps": (lambda value: value > 0, "positive"),
    "weight_decay": (lambda value: value >= 0, "zero or more"),
    "momentum": (lambda value: 0 <= value < 1, "in [0, 1)"),
}


class ParameterGroup(BaseModel):
    """Parameters that differ from the others in what is given here; the first group that matches a name takes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    parameters: tuple[str, ...]
    """Globs of parameter names; each has to match one."""
    lr: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """Weight decay, also of those that no_decay names."""
    betas: tuple[float, float] | None = None
    """Decay rates of the running means."""
    eps: float | None = None
    """Added to the denominator."""
    momentum: float | None = None
    """Decay rate of the momentum."""

    def given(self) -> dict[str, Any]:
        """What it sets."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "parameters"}
        return {name: value for name, value in values.items() if value is not None}


def one_kind(name: str, parameter: Tensor) -> int:
    """The kind of every parameter where all are updated alike."""
    return 0


def arrange(
    component: Callable[..., object],
    model: Model,
    groups: Sequence[ParameterGroup],
    no_decay: Sequence[str],
    settings: Sequence[Mapping[str, Any]],
    kind: Callable[[str, Tensor], int] = one_kind,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups for ``torch.optim.Optimizer``, with their names.

    Args:
        component: whose arguments these are, for error positions.
        model: whose parameters are trained.
        groups: what differs from ``settings``.
        no_decay: globs of parameter names without weight decay.
        settings: of each kind of parameter.
        kind: index into ``settings``, from a parameter's name and value.

    Returns:
        First the parameters of no group, those of kind 0 ahead, with weight decay ahead; then each group likewise.

    Raises:
        ConfigError: a number is out of range, a glob matches no parameter, or nothing is trainable.
    """
    parameters = trainable(model)
    if not parameters:
        raise ConfigError("the model has no parameter that takes gradients", about=model)
    # A rank of a pipeline may hold none of what a glob names.
    everywhere = list(trainable(cast(Model, whole(model))))
    if tuple(no_decay) != NO_DECAY:
        refuse_unmatched(component, "no_decay", no_decay, everywhere)
    _check(component, groups, settings, everywhere)
    taken_by = {name: _first_group(name, groups) for name in everywhere}
    members: dict[tuple[int, int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, value in parameters.items():
        place = taken_by[name]
        decided = place >= 0 and groups[place].weight_decay is not None
        exempt = matches(name, no_decay) and not decided
        members.setdefault((place, kind(name, value), exempt), []).append((name, value))
    for place, group in enumerate(groups):
        if place not in taken_by.values():
            taken = (
                f"groups[{place}] gets no parameter: earlier groups take all that {', '.join(group.parameters)} match"
            )
            raise ConfigError(taken, hint="put it before them", about=(component, "groups"))
    arranged = []
    for (place, which, exempt), named in sorted(members.items(), key=lambda item: item[0]):
        own = dict(settings[which]) | (groups[place].given() if place >= 0 else {})
        arranged.append(own | ({"weight_decay": 0.0} if exempt else {}) | {"params": named})
    return arranged


def _first_group(name: str, groups: Sequence[ParameterGroup]) -> int:
    """The place of the group that takes a parameter; -1 where none does."""
    return next((at for at, group in enumerate(groups) if matches(name, group.parameters)), -1)


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether any of the globs, case-sensitive, matches the whole name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def check_ranges(component: Callable[..., object], numbers: Mapping[str, Any], within: str = "") -> None:
    """Refuse numbers that no optimizer can use; each key is an argument of ``component``, or of one of its groups."""
    for name, value in numbers.items():
        fits, wanted = _RANGES[name]
        if not fits(value):
            message = f"{within}{name} has to be {wanted}, not {value}"
            raise ConfigError(message, about=(component, "groups" if within else name))


def refuse_unmatched(
    component: Callable[..., object], argument: str, globs: Sequence[str], names: Sequence[str]
) -> None:
    """Refuse globs that match none of the names."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            some = ", ".join(names[:5])
            raise ConfigError(
                f"{argument} has {glob!r}, which matches no parameter",
                hint=f"the model's {len(names)} parameters are {some}{', ...' if len(names) > 5 else ''}",
                about=(component, argument),
            )


def _check(
    component: Callable[..., object],
    groups: Sequence[ParameterGroup],
    settings: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> None:
    known = {name for values in settings for name in values}
    for place, group in enumerate(groups):
        refuse_unmatched(component, "groups", group.parameters, names)
        for name in group.given():
            if name not in known:
                message = f"groups[{place}] sets {name}, which this optimizer does not have"
                raise ConfigError(message, about=(component, "groups"))
        check_ranges(component, group.given(), f"groups[{place}].")
