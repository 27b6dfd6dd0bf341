"""The communication test finds the rank that was made slow on purpose, and only that one."""

from __future__ import annotations

import itertools

import pytest

from modalities_parallel.communication import slow_ranks
from modalities_parallel.pairs import tournament

REPORT = "communication_programs:report"


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
def test_in_a_tournament_every_two_meet_once(ranks: int) -> None:
    met = []
    for opponents in tournament(ranks):
        assert all(opponents[opponents[rank]] == rank for rank in range(ranks)), "not mutual"
        met += [(rank, other) for rank, other in enumerate(opponents) if rank < other]
    assert sorted(met) == list(itertools.combinations(range(ranks), 2))
    assert len(tournament(ranks)) == ranks - 1 + ranks % 2


def test_one_slow_link_blames_nobody_but_a_rank_with_slow_links_only_is_slow() -> None:
    pairs = [[0.0 if i == j else 1.0 for j in range(4)] for i in range(4)]
    assert slow_ranks([1.0, 1.0, 1.1, 1.0], pairs) == []
    pairs[1][2] = pairs[2][1] = 9.0
    assert slow_ranks([1.0] * 4, pairs) == []
    for other in (0, 1, 3):
        pairs[2][other] = pairs[other][2] = 9.0
    assert slow_ranks([1.0, 1.0, 1.0, 3.0], pairs) == [(3, "compute", 3.0), (2, "messages", 9.0)]


def test_two_ranks_are_measured_and_the_slow_one_is_found(on_ranks) -> None:
    results = on_ranks(2, REPORT, slow=1, what="compute")
    assert results[0] == results[1], "the ranks disagree"
    found = results[0]
    assert [(axis, operation, size) for axis, _, operation, size, _, _ in found["collectives"]] == [
        ("dp_shard", operation, size)
        for operation in ("all_reduce", "all_gather", "reduce_scatter")
        for size in (4096, 65536)
    ]
    for _, ranks, operation, size, seconds, bandwidth in found["collectives"]:
        assert seconds > 0
        assert bandwidth == pytest.approx(
            (2 if operation == "all_reduce" else 1) * (ranks - 1) / ranks * size / seconds
        )
    assert [(rank, what) for rank, what, _ in found["slow"]] == [(1, "compute")]
    assert 2 < found["slow"][0][2] < 5
    assert found["pair_seconds"][0][0] == 0 < found["pair_seconds"][0][1]
    assert abs(found["clock_offsets"][1]) < 0.5
    assert found["wrong_clocks"] == []


@pytest.mark.slow
def test_four_ranks_on_two_axes(on_ranks) -> None:
    found = on_ranks(4, REPORT, slow=2, what="messages", dp_replicate=2)[0]
    assert [axis for axis, *_ in found["collectives"][::6]] == ["dp_replicate", "dp_shard", "all"]
    assert [ranks for _, ranks, *_ in found["collectives"][::6]] == [2, 2, 4]
    assert (2, "messages") in [(rank, what) for rank, what, _ in found["slow"]]
    assert not [rank for rank, what, _ in found["slow"] if what == "messages" and rank != 2]


@pytest.mark.slow
def test_every_axis_is_named_and_cp_and_ep_exchange(on_ranks) -> None:
    found = on_ranks(4, REPORT, cp=2, ep=4)[0]
    reductions = ["all_reduce", "all_gather", "reduce_scatter"]
    expected = {
        "dp_shard": (2, reductions),
        "cp": (2, [*reductions, "all_to_all"]),
        "dp_shard x cp": (4, reductions),
        "ep": (4, [*reductions, "all_to_all"]),
        "all": (4, reductions),
    }
    rows = [(axis, ranks, operation) for axis, ranks, operation, *_ in found["collectives"][::2]]
    assert rows == [(axis, ranks, name) for axis, (ranks, names) in expected.items() for name in names]


@pytest.mark.slow
def test_a_clock_that_is_wrong(on_ranks) -> None:
    found = on_ranks(2, REPORT, slow=1, what="clock")[0]
    assert found["clock_offsets"][1] == pytest.approx(100, abs=1)
    assert found["wrong_clocks"] == [1]
