"""Batches: the union over ranks is the same samples in the same order, however the step is split."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.interfaces import Batches, HeldOut, Samples
from modalities_data.order import shuffled

torch = pytest.importorskip("torch")

from modalities_data.loading import steps  # noqa: E402
from modalities_data.loading.batches import HeldOutBatches, InOrderBatches, ShuffledBatches  # noqa: E402


@dataclass
class Place:
    """As much of a World as batches look at."""

    data_rank: int = 0
    data_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Counting:
    """Sample i holds i * 10 to i * 10 + T; weights say which sample and target they belong to."""

    largest_id = 10**6
    bytes_per_token = 2.0

    def __init__(self, samples: int, sequence_length: int = 4, weighted: bool = False, fingerprint: str = "x") -> None:
        self.samples, self.sequence_length, self.weighted = samples, sequence_length, weighted
        self.fingerprint = fingerprint
        self.threads: list[str] = []

    def __len__(self) -> int:
        return self.samples

    def gather(self, indices: np.ndarray) -> Samples:
        self.threads.append(threading.current_thread().name)
        tokens = (indices[:, None] * 10 + np.arange(self.sequence_length + 1)).astype(np.uint16)
        weights = (indices[:, None] + np.arange(self.sequence_length) / 8).astype(np.float32)
        return Samples(tokens, weights if self.weighted else None)


def step_of_all_ranks(dataset, ranks, samples_per_step, micro, step, seed=0):
    """All inputs of a step in rank and micro batch order, and how many micro batches a rank has."""
    found = []
    for rank in range(ranks):
        batches = ShuffledBatches(dataset, Place(rank, ranks), samples_per_step, micro, seed)
        found.append(batches.micro_batches(step))
    assert {len(part) for part in found} == {samples_per_step // micro // ranks}
    assert all(batch.tokens_BT.shape == (micro, dataset.sequence_length) for part in found for batch in part)
    return torch.cat([batch.tokens_BT for part in found for batch in part])


@pytest.mark.parametrize("step", [0, 1, 2, 57])
def test_the_samples_of_a_step_depend_on_nothing_but_seed_and_step(step) -> None:
    dataset = Counting(37)
    positions = np.arange(step * 24, step * 24 + 24)
    expected = torch.from_numpy(shuffled(positions, 37, 5)[:, None] * 10 + np.arange(4))
    for ranks, micro in [(1, 24), (1, 1), (2, 12), (2, 3), (3, 4), (4, 6), (4, 2), (8, 3), (24, 1)]:
        assert torch.equal(step_of_all_ranks(dataset, ranks, 24, micro, step, seed=5), expected)


def test_an_epoch_takes_every_sample_once_and_the_next_in_another_order() -> None:
    batches = ShuffledBatches(Counting(40), Place(), 8, 4, seed=1)
    samples = [(batch.tokens_BT[:, 0] // 10).tolist() for step in range(10) for batch in batches.micro_batches(step)]
    order = [sample for part in samples for sample in part]
    assert sorted(order[:40]) == sorted(order[40:]) == list(range(40))
    assert order[:40] != order[40:] and order[:40] != sorted(order[:40])


def test_any_step_can_be_asked_for_at_any_time() -> None:
    """Resuming is arithmetic: a fresh object gives what the uninterrupted one gave."""
    straight = ShuffledBatches(Counting(100), Place(1, 2), 8, 2)
    run = {step: torch.cat([b.tokens_BT for b in straight.micro_batches(step)]) for step in range(30)}
    for step in (17, 18, 3, 3, 29, 0, 1):
        assert torch.equal(torch.cat([b.tokens_BT for b in straight.micro_batches(step)]), run[step])
        fresh = ShuffledBatches(Counting(100), Place(1, 2), 8, 4)
        assert torch.equal(torch.cat([b.tokens_BT for b in fresh.micro_batches(step)]), run[step])


def test_batches_are_contiguous_int64_and_targets_follow_inputs() -> None:
    for batch in ShuffledBatches(Counting(20), Place(), 6, 3).micro_batches(0):
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert batch.tokens_BT.is_contiguous() and batch.targets_BT.is_contiguous()
        assert torch.equal(batch.targets_BT, batch.tokens_BT + 1)
        assert batch.weights_BT is None


def test_weights_go_with_their_samples() -> None:
    for batch in ShuffledBatches(Counting(20, weighted=True), Place(), 6, 3).micro_batches(2):
        assert batch.weights_BT.dtype == torch.float32
        assert torch.equal(batch.weights_BT, batch.tokens_BT // 10 + torch.arange(4) / 8)


def test_the_next_step_is_read_on_a_thread_and_its_errors_come_with_it() -> None:
    dataset = Counting(50)
    batches = ShuffledBatches(dataset, Place(), 2, 2)
    batches.micro_batches(0)
    batches.micro_batches(1)
    assert dataset.threads[0] == threading.current_thread().name
    assert all(name.startswith("batches") for name in dataset.threads[1:])

    def fail(indices):
        raise RuntimeError("disk gone")

    batches.micro_batches(2)
    batches._reader.submit(lambda: None).result()
    dataset.gather = fail
    batches.micro_batches(3)
    with pytest.raises(RuntimeError, match="disk gone"):
        batches.micro_batches(4)


def test_the_fingerprint_is_of_data_and_order_not_of_the_split() -> None:
    def of(fingerprint="x", seed=0, length=4, ranks=1, step=8, micro=2):
        return ShuffledBatches(Counting(50, length, fingerprint=fingerprint), Place(0, ranks), step, micro, seed)

    assert isinstance(of(), Batches)
    assert of().fingerprint == of(ranks=2).fingerprint == of(micro=4).fingerprint
    assert len({of().fingerprint, of("y").fingerprint, of(seed=1).fingerprint, of(length=5).fingerprint}) == 4
    assert (of().samples_per_step, of().sequence_length, of().largest_id) == (8, 4, 10**6)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"samples_per_step": 10}, "samples_per_step"),
        ({"samples_per_step": 0}, "samples_per_step"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_does_not_divide_is_refused(arguments, argument) -> None:
    with pytest.raises(ConfigError) as caught:
        ShuffledBatches(Counting(50), Place(0, 2), **{"samples_per_step": 8, "micro_batch_size": 4, **arguments})
    assert caught.value.about[1] == argument


@settings(max_examples=80, deadline=None)
@given(
    samples=st.integers(1, 50), ranks=st.integers(1, 6), micro=st.integers(1, 7), most=st.none() | st.integers(1, 60)
)
def test_held_out_counts_every_sample_once_with_equal_shapes_on_every_rank(samples, ranks, micro, most) -> None:
    dataset = Counting(samples)
    expected = min(samples, most or samples)
    seen, counts = [], set()
    for rank in range(ranks):
        held_out = HeldOutBatches(dataset, Place(rank, ranks), micro, most)
        batches = list(held_out)
        counts.add(len(batches))
        assert len(batches) == len(held_out)
        assert len({batch.weights_BT is None for batch in batches}) == 1
        for batch in batches:
            assert batch.tokens_BT.shape == batch.targets_BT.shape == (micro, 4)
            for row in range(micro):
                weights = {1.0} if batch.weights_BT is None else set(batch.weights_BT[row].tolist())
                assert len(weights) == 1 and weights <= {0.0, 1.0}
                if weights == {1.0}:
                    seen.append(int(batch.tokens_BT[row, 0]) // 10)
        assert [batch.tokens_BT.tolist() for batch in held_out] == [batch.tokens_BT.tolist() for batch in batches]
    assert sorted(seen) == list(range(expected))
    assert counts == {-(-expected // (ranks * micro))}


def test_held_out_keeps_the_weights_of_the_data() -> None:
    batches = list(HeldOutBatches(Counting(5, weighted=True), Place(), 4))
    assert torch.equal(batches[0].weights_BT, batches[0].tokens_BT // 10 + torch.arange(4) / 8)
    assert batches[1].weights_BT[0].tolist() == [4.0, 4.125, 4.25, 4.375]
    assert not batches[1].weights_BT[1:].any()
    assert isinstance(HeldOutBatches(Counting(5), Place(), 4), HeldOut)
    with pytest.raises(ConfigError, match="max_samples"):
        HeldOutBatches(Counting(5), Place(), 4, 0)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 60), ranks=st.integers(1, 6), micro=st.integers(1, 4), accumulated=st.integers(1, 4),
    step=st.integers(0, 200), kind=st.sampled_from([ShuffledBatches, InOrderBatches]),
)  # fmt: skip
def test_all_ranks_together_see_the_same_sequence(samples, ranks, micro, accumulated, step, kind) -> None:
    dataset, per_step = Counting(samples), ranks * micro * accumulated
    found = [
        torch.cat([batch.tokens_BT for batch in kind(dataset, Place(rank, ranks), per_step, micro).micro_batches(step)])
        for rank in range(ranks)
    ]
    alone = kind(dataset, Place(), per_step, per_step).micro_batches(step)
    assert torch.equal(torch.cat(found), alone[0].tokens_BT)
    places = np.arange(step * per_step, (step + 1) * per_step)
    order = shuffled(places, samples, 0) if kind is ShuffledBatches else places % samples
    assert (alone[0].tokens_BT[:, 0] // 10).tolist() == order.tolist()


def taken(batches, steps):
    """The next steps of this object, as lists of samples."""
    return [[row for batch in next(batches) for row in (batch.tokens_BT[:, 0] // 10).tolist()] for _ in range(steps)]


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 60), before=st.integers(0, 12), ranks=st.integers(1, 4), again=st.integers(1, 4))
def test_going_on_from_any_point_gives_the_tail(samples, before, ranks, again) -> None:
    """Stopped on some ranks, taken up on others with another micro batch and half as many samples per step."""
    dataset = Counting(samples)
    straight = taken(iter(ShuffledBatches(dataset, Place(), 24, 24, 5)), before + 4)
    first = ShuffledBatches(dataset, Place(ranks - 1, ranks), 24, 24 // ranks, 5)
    taken(iter(first), before)
    state = json.loads(json.dumps(first.state_dict()))
    assert len(json.dumps(state)) < 200
    rest = []
    for rank in range(again):
        resumed = ShuffledBatches(dataset, Place(rank, again), 12, 12 // again, 5)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        rest.append(taken(iter(resumed), 8))
    joined = [[row for of_rank in rest for row in of_rank[step]] for step in range(8)]
    assert [joined[step] + joined[step + 1] for step in range(0, 8, 2)] == straight[before:]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "expected the state of batches"),
        ({"version": 2, "samples": 8}, "expected the state of batches"),
        ({"samples": "8"}, "expected the state of batches"),
        ({"fingerprint": "other"}, "belongs to the data other"),
        ({"samples": 9}, "9 samples are no whole number of steps of 8"),
    ],
)
def test_the_state_of_something_else_is_refused(state, message) -> None:
    batches = ShuffledBatches(Counting(50), Place(), 8, 4)
    good = {**batches.state_dict(), "samples": 80}
    with pytest.raises(CheckpointError, match=message):
        batches.load_state_dict({**good, **state} if state else state)
    assert batches.state_dict()["samples"] == 0
    batches.load_state_dict(good)
    assert batches.state_dict() == good
    other = ShuffledBatches(Counting(50), Place(), 8, 4, seed=1)
    with pytest.raises(CheckpointError, match="use the same dataset, sequence length and seed"):
        other.load_state_dict(good)


def test_in_order_and_shuffled_are_different_data() -> None:
    prints = {kind(Counting(50), Place(), 8, 4).fingerprint for kind in (ShuffledBatches, InOrderBatches)}
    assert len(prints) == 2
    assert isinstance(InOrderBatches(Counting(50), Place(), 8, 4), Batches)
    with pytest.raises(ConfigError, match="micro_batch_size is at least 1"):
        InOrderBatches(Counting(50), Place(), 8, 0)


class Segmented(Counting):
    """The second half of each sample is another document."""

    def gather(self, indices: np.ndarray) -> Samples:
        segments = np.broadcast_to(np.arange(self.sequence_length) * 2 // self.sequence_length, (len(indices), 4))
        return super().gather(indices)._replace(segments=segments)


def test_segments_become_int32_tensors() -> None:
    for batches in (
        ShuffledBatches(Segmented(20), Place(), 6, 3).micro_batches(0),
        HeldOutBatches(Segmented(20), Place(), 3),
    ):
        for batch in batches:
            assert batch.segments_BT.dtype == torch.int32 and batch.segments_BT.tolist() == [[0, 0, 1, 1]] * 3
            assert batch.to("cpu").segments_BT.tolist() == [[0, 0, 1, 1]] * 3
    assert ShuffledBatches(Counting(20), Place(), 6, 3).micro_batches(0)[0].segments_BT is None


@pytest.mark.gpu
def test_on_a_gpu_the_next_micro_batch_is_copied_ahead() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for dataset in (Counting(100, weighted=True), Segmented(100)):
        expected = ShuffledBatches(dataset, Place(), 12, 3)
        batches = ShuffledBatches(dataset, Place(device=device), 12, 3)
        for step in range(5):
            host, found = expected.micro_batches(step), batches.micro_batches(step)
            assert len(found) == len(host) == 4
            for ours, theirs in zip(found, host, strict=True):
                for name in ("tokens_BT", "targets_BT", "weights_BT", "segments_BT"):
                    tensor, wanted = getattr(ours, name), getattr(theirs, name)
                    assert (tensor is None) == (wanted is None)
                    if tensor is not None:
                        assert tensor.device == device and torch.equal(tensor.cpu(), wanted)
            assert torch.equal(found[-1].tokens_BT.cpu(), host[-1].tokens_BT)
        assert all(tensor.is_pinned() for batch in batches._ahead[1].result() for tensor in (batch.tokens_BT,))


@pytest.mark.parametrize("together", [1, 5, 8, 512])
def test_several_micro_batches_are_read_at_once(monkeypatch, together) -> None:
    """How many a call reads shows in nothing but the number of calls."""
    monkeypatch.setattr(steps, "GATHERED_TOGETHER", together)
    expected = shuffled(np.arange(24, 48), 37, 5)
    for micro in (2, 3, 12, 24):
        dataset = Segmented(37, weighted=True)
        found = ShuffledBatches(dataset, Place(), 24, micro, seed=5)._compute(1)
        assert len(found) == 24 // micro
        assert len(dataset.threads) == -(-24 // (micro * max(1, together // micro)))
        for batch, indices in zip(found, np.split(expected, 24 // micro), strict=True):
            first = torch.from_numpy(indices)[:, None]
            assert torch.equal(batch.tokens_BT, first * 10 + torch.arange(4))
            assert torch.equal(batch.weights_BT, first + torch.arange(4) / 8)
            assert batch.segments_BT.tolist() == [[0, 0, 1, 1]] * micro


@pytest.mark.parametrize("made_ahead", [0, 1 << 18])
def test_micro_batches_are_a_sequence(monkeypatch, made_ahead) -> None:
    monkeypatch.setattr(steps, "MADE_AHEAD", made_ahead)
    batches = ShuffledBatches(Counting(50), Place(), 8, 2).micro_batches(0)
    whole = [batch.tokens_BT.tolist() for batch in batches]
    assert len(batches) == len(whole) == 4
    assert [batches[number - 4].tokens_BT.tolist() for number in range(4)] == whole
    assert [batch.tokens_BT.tolist() for batch in batches[1:3]] == whole[1:3]
    batches[0].tokens_BT.zero_()  # one's own tensors: what is read stays as it is
    assert batches[1].tokens_BT.tolist() == whole[1]
    if not made_ahead:
        assert batches[0].tokens_BT.tolist() == whole[0], "made anew each time"
    with pytest.raises(IndexError):
        batches[4]
