"""A rank that is killed at any point of a save in the background leaves a valid checkpoint, and nothing is repeated."""

from __future__ import annotations

import pytest


def test_killed_at_some_points_of_a_save(on_ranks, tmp_path):
    (found,) = on_ranks(1, "checkpoint_programs:kills", folder=str(tmp_path), size=1, points=2, times=0)
    assert found["calls"][0] > 20
    assert set(found["steps"]) == {2, 4}


@pytest.mark.slow
def test_killed_at_many_points_of_a_save(on_ranks, tmp_path):
    arguments = {"folder": str(tmp_path), "size": 1, "points": 24, "times": 4}
    (found,) = on_ranks(1, "checkpoint_programs:kills", timeout=280, **arguments)
    assert found["tried"] == 24
    assert set(found["steps"]) == {2, 4}


@pytest.mark.slow
def test_a_rank_of_two_is_killed(on_ranks, tmp_path):
    arguments = {"folder": str(tmp_path), "size": 2, "points": 3, "times": 1}
    (found,) = on_ranks(1, "checkpoint_programs:kills", timeout=280, **arguments)
    assert set(found["steps"]) == {2, 4}
