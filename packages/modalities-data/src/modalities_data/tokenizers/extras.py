"""Libraries that come with an extra of this package."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from modalities_core.errors import ConfigError


def optional(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``.

    Args:
        module: its name.
        extra: of modalities-data, that installs it.
        purpose: what needs it, the start of the message.

    Raises:
        ConfigError: it is not installed; the message has the line that mends it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the package {module} ({error})", hint=f'pip install "modalities-data[{extra}]"'
        ) from error
