"""Random numbers of a step that need not be stored to resume."""

from __future__ import annotations

import hashlib

import torch


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for the random numbers of one step on one rank, so that none has to be stored to resume.

    Ranks that see the same data get others too, for each works on other tokens, heads or blocks.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of ``device``.

    ``torch.manual_seed`` means every kind of device; for one not in use it notes down the whole stack, each time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
