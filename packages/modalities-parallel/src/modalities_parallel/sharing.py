"""What a world says about a model that is not shared out over its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modalities_core.errors import ConfigError

if TYPE_CHECKING:
    from modalities_parallel.mesh import Degrees

UNUSED = {"tp": "splits its matrix products", "cp": "cuts its samples", "pp": "shares out its blocks"}
"""What does not happen along an axis without parallel.fsdp2."""


def unshared(degrees: Degrees, what: str, model: object) -> ConfigError:
    """The refusal of a model that was built without parallel.fsdp2.

    Args:
        degrees: of the mesh.
        what: parameters that each rank has a copy of.
        model: for the position in the configuration.
    """
    nothing = "nothing reduces their gradients"
    for axis, missing in UNUSED.items():
        if (degree := getattr(degrees, axis)) > 1:
            nothing += f", and nothing {missing} along {axis} {degree}"
    return ConfigError(
        f"{degrees.ranks} ranks would each train their own copy of {what}: {nothing}",
        hint="wrap the model in the component parallel.fsdp2",
        about=model,
    )


def some_of(names: Sequence[str]) -> str:
    """The first three of ``names``, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
