"""Packages that only some sinks need."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from modalities_core.errors import ConfigError


def require(module: str, extra: str, oldest: tuple[int, int] | None = None) -> None:
    """Refuse to go on without an optional package, without importing it.

    Args:
        module: what is imported.
        extra: of modalities-core, that brings it.
        oldest: major and minor version that will do; the distribution is then called like the module.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    hint = f'pip install "modalities-core[{extra}]"'
    if find_spec(module) is None:
        raise ConfigError(f"sink.{extra} needs the package {module}, which is not installed", hint=hint)
    if oldest is None:
        return
    try:
        found = tuple(int(part) for part in version(module).split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return
    if found < oldest:
        needed, present = (".".join(map(str, numbers)) for numbers in (oldest, found))
        raise ConfigError(f"sink.{extra} needs {module} {needed} or newer, here is {present}", hint=hint)
