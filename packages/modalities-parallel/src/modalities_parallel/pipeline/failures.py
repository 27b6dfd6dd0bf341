"""What went wrong in a stage, without what schedules wrap around it."""

from __future__ import annotations

import re

from modalities_core.errors import DistributedError, ModalitiesError, first_line
from modalities_core.interfaces import World

_COMMUNICATION = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|store", re.IGNORECASE)


def explained(error: BaseException, world: World) -> BaseException:
    """The error that a stage raised, or a DistributedError where another rank did not answer.

    Args:
        error: as it came out of a schedule, which raises new errors from those of the model.
        world: the ranks.
    """
    root = error
    while root.__cause__ is not None and not isinstance(root, ModalitiesError):
        root = root.__cause__
    if isinstance(root, RuntimeError) and _COMMUNICATION.search(str(root)):
        lost = DistributedError(
            f"rank {world.rank} of {world.size} lost the others in a pipeline: {first_line(root)}",
            hint="another rank has failed or hangs: look for the first error in the logs of the other ranks",
        )
        lost.__cause__ = root
        return lost
    return root
