"""Batches that grow: the same samples in the same order for any number of ranks, and resuming is arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.interfaces import Samples
from modalities_data.batch_sizes import Stage, Stages

torch = pytest.importorskip("torch")

from modalities_data.loading.batches import InOrderBatches, ShuffledBatches  # noqa: E402

GROWING = Stages([Stage(from_step=step, samples=size) for step, size in [(0, 4), (3, 8), (5, 24)]])


@dataclass
class Place:
    """As much of a World as batches look at."""

    data_rank: int = 0
    data_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Numbered:
    """37 samples that hold their number."""

    sequence_length, largest_id, fingerprint, bytes_per_token = 2, 36, "x", None

    def __len__(self) -> int:
        return 37

    def gather(self, indices: np.ndarray) -> Samples:
        return Samples(np.repeat(indices[:, None], 3, 1))


def samples_of_run(steps, ranks=1, micro=4, kind=ShuffledBatches, warmup=GROWING):
    """The samples of each step over all ranks, in rank and micro batch order."""
    found = [[] for _ in range(steps)]
    for rank in range(ranks):
        batches = kind(Numbered(), Place(rank, ranks), 24, micro, warmup=warmup)
        for step in range(steps):
            parts = batches.micro_batches(step)
            assert len({len(batch.tokens_BT) for batch in parts}) == 1
            found[step] += [int(first) for batch in parts for first in batch.tokens_BT[:, 0]]
    return found


@pytest.mark.parametrize("kind", [ShuffledBatches, InOrderBatches])
def test_the_samples_and_their_order_are_those_of_constant_steps(kind) -> None:
    grown = [sample for step in samples_of_run(9, kind=kind) for sample in step]
    constant = [sample for step in samples_of_run(6, kind=kind, warmup=None) for sample in step]
    assert len(grown) == 3 * 4 + 2 * 8 + 4 * 24
    assert grown == constant[: len(grown)]


def test_every_number_of_ranks_sees_the_same_steps() -> None:
    alone = samples_of_run(8)
    assert [len(step) for step in alone] == [4, 4, 4, 8, 8, 24, 24, 24]
    for ranks, micro in [(1, 1), (2, 2), (2, 1), (4, 1)]:
        assert samples_of_run(8, ranks, micro) == alone


def test_a_fresh_object_goes_on_at_any_step() -> None:
    whole = samples_of_run(9)
    run = ShuffledBatches(Numbered(), Place(), 24, 4, warmup=GROWING)
    for step in range(9):
        state = run.state_dict()
        resumed = ShuffledBatches(Numbered(), Place(), 24, 2, warmup=GROWING)
        resumed.load_state_dict(state)
        parts = next(iter(resumed))
        assert [int(first) for batch in parts for first in batch.tokens_BT[:, 0]] == whole[step]
        assert state["samples"] == run.samples(step).start
        run.micro_batches(step)
    with pytest.raises(CheckpointError, match="no whole number of steps"):
        run.load_state_dict(state | {"samples": 13})


def test_sizes_that_ranks_cannot_share_are_refused_with_the_nearest_that_work() -> None:
    with pytest.raises(ConfigError, match="global batch of 4 samples cannot be split") as caught:
        ShuffledBatches(Numbered(), Place(0, 2), 24, 3, warmup=GROWING)
    assert caught.value.about[1] == "warmup"
    assert "nearest that work" in caught.value.hint
    with pytest.raises(ConfigError, match="global batch of 24 samples") as caught:
        ShuffledBatches(Numbered(), Place(0, 5), 24, 1, warmup=GROWING)
    assert caught.value.about[1] == "samples_per_step"
