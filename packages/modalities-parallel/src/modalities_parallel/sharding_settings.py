"""How a model was asked to be shared out."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sharding(NamedTuple):
    """What parallel.fsdp2 was given; the wrapped model has it as ``sharding``, for whoever plans or runs it.

    param_dtype: of gathered weights and of activations.
    reduce_dtype: of gradients on their way.
    reshard_after_forward: whether blocks free their gathered weights after the forward.
    stages_per_rank: of a pipeline.
    blocks_per_unit: neighbouring blocks that are gathered at once.
    prefetch: units gathered ahead of their use; 0 leaves it to FSDP2.
    offload: whether shards of weights and gradients, and the optimizer, are in the host's memory.
    """

    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    reshard_after_forward: bool
    stages_per_rank: int = 1
    blocks_per_unit: int = 1
    prefetch: int = 0
    offload: bool = False
