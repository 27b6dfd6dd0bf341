"""What the launcher tells a process about its place in the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from modalities_core.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HINT = "start the run with torchrun, or unset what an earlier launch left behind: unset RANK WORLD_SIZE LOCAL_RANK"


class Launch(NamedTuple):
    """One process of a launch, as torchrun describes it.

    rank: of this process among all, from 0.
    size: processes in all.
    local_rank: of this process on its node, from 0; also its accelerator.
    address: host of rank 0.
    port: where the processes meet on that host.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch this process belongs to, or None where no launcher started it.

    Raises:
        ConfigError: variables are missing, not numbers, or contradict each other.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in NAMES if not environment.get(name)]
    if missing:
        present = [name for name in NAMES if environment.get(name)]
        raise ConfigError(
            f"the environment describes half a launch: {', '.join(present) or 'nothing'} set, "
            f"{', '.join(missing)} missing",
            hint=HINT,
        )
    rank, size, local_rank, port = (_number(environment, name) for name in NAMES if name != "MASTER_ADDR")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {size}: ranks count from 0 to {size - 1}", hint=HINT)
    if not 0 <= local_rank < size:
        raise ConfigError(f"LOCAL_RANK is {local_rank}, but WORLD_SIZE is {size}", hint=HINT)
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT is {port}, which is not a port: 1 to 65535", hint=HINT)
    return Launch(rank, size, local_rank, environment["MASTER_ADDR"], port)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.strip().lstrip("-").isdecimal():
        raise ConfigError(f"{name} is {text!r}, which is not a whole number", hint=HINT)
    return int(text)
