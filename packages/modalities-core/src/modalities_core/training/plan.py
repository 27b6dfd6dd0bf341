"""From the globs of a model's parallel plan to its modules."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.parameters import whole


def matching(model: nn.Module, globs: Iterable[str], *, component: object = None) -> dict[str, nn.Module]:
    """The submodules whose names match any of ``globs``, in the order of the model, parents before children.

    A name matches part by part: ``blocks.*`` takes ``blocks.0`` but not ``blocks.0.attention``.

    Args:
        model: whose submodules.
        globs: patterns over dotted module names, case sensitive; ``*``, ``?`` and ``[...]`` stay within one part.
        component: the component that was given the model, for error positions.

    Raises:
        ConfigError: a glob matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    # A rank of a pipeline may hold none of what a glob names.
    everywhere = {name for name, _ in whole(cast(Model, model)).named_modules() if name}
    matched: set[str] = set()
    for glob in globs:
        found = [name for name in modules if fits(name, glob)]
        if not found and not any(fits(name, glob) for name in everywhere):
            raise unmatched(model, glob, modules, component)
        matched.update(found)
    return {name: module for name, module in modules.items() if name in matched}


def unmatched(model: nn.Module, glob: str, names: Iterable[str], component: object = None) -> ConfigError:
    """What a user is told whose model's plan has a glob that none of ``names`` matches."""
    return ConfigError(
        f"the parallel plan of {type(model).__name__} names {glob!r}, which matches none of its modules",
        hint=_near(glob, names),
        about=(component, "model"),
    )


def fits(name: str, glob: str) -> bool:
    """Whether a dotted name matches a glob, part by part."""
    parts, patterns = name.split("."), glob.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _near(glob: str, names: Iterable[str]) -> str:
    """Names that are written like ``glob``, the same one for all its numbers."""
    general = list(dict.fromkeys(".".join("*" if p.isdecimal() else p for p in name.split(".")) for name in names))
    near = get_close_matches(glob, general, n=3, cutoff=0.4) or general[:5]
    return f"near it: {', '.join(near)}" if near else "the model has no submodules"
