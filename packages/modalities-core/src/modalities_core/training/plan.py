"""From the globs of a model's parallel plan to its modules."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from modalities_core.errors import ConfigError


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
    matched: set[str] = set()
    for glob in globs:
        found = [name for name in modules if _matches(name, glob)]
        if not found:
            raise ConfigError(
                f"the parallel plan of {type(model).__name__} names {glob!r}, which matches none of its modules",
                hint=_near(glob, modules),
                about=(component, "model"),
            )
        matched.update(found)
    return {name: module for name, module in modules.items() if name in matched}


def _matches(name: str, glob: str) -> bool:
    parts, patterns = name.split("."), glob.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _near(glob: str, names: Iterable[str]) -> str:
    """Names that are written like ``glob``, the same one for all its numbers."""
    general = list(dict.fromkeys(".".join("*" if p.isdecimal() else p for p in name.split(".")) for name in names))
    near = get_close_matches(glob, general, n=3, cutoff=0.4) or general[:5]
    return f"near it: {', '.join(near)}" if near else "the model has no submodules"
