"""A rank that is killed at any point of a save in the background leaves a valid checkpoint, and nothing is repeated."""

from __future__ import annotations

import pytest


def test_killed_at_some_points_of_a_save(on_ranks, tmp_path):
    (found,) = on_ranks(1, "checkpoint_programs:kills", folder=str(tmp_path), size=1, points=3, times=0)
    assert found["calls"][0] > 20
    assert set(found["steps"]) == {2, 4}


@pytest.mark.slow
def test_killed_at_every_point_of_a_save(on_ranks, tmp_path):
    arguments = {"folder": str(tmp_path), "size": 1, "points": 0, "times": 10}
    (found,) = on_ranks(1, "checkpoint_programs:kills", timeout=600, **arguments)
    assert found["tried"] == found["calls"][0]
    assert set(found["steps"]) == {2, 4}


@pytest.mark.slow
def test_a_rank_of_two_is_killed(on_ranks, tmp_path):
    arguments = {"folder": str(tmp_path), "size": 2, "points": 10, "times": 3}
    (found,) = on_ranks(1, "checkpoint_programs:kills", timeout=600, **arguments)
    assert found["tried"] >= 10
    assert set(found["steps"]) == {2, 4}
