from __future__ import annotations

import pytest
from parallel_small_model import SmallModel
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.training.plan import matching
from modalities_parallel.environment import launch
from modalities_parallel.mesh import degrees
from modalities_parallel.world import auto

PLACE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("ranks", "dp_replicate", "dp_shard", "expected"),
    [(1, 1, "auto", (1, 1)), (8, 1, "auto", (1, 8)), (8, 2, "auto", (2, 4)), (8, 8, "auto", (8, 1)), (6, 2, 3, (2, 3))],
)
def test_degrees_resolve(ranks, dp_replicate, dp_shard, expected):
    assert degrees(ranks, dp_replicate, dp_shard)[1:3] == expected


@pytest.mark.parametrize(
    ("ranks", "dp_replicate", "dp_shard", "argument", "said"),
    [
        (8, 3, "auto", "dp_replicate", "8 ranks cannot be split into dp_replicate = 3 equal groups"),
        (8, 2, 3, "dp_shard", "dp_replicate 2 x dp_shard 3 = 6, but this run has 8 ranks"),
        (1, 1, 2, "dp_shard", "dp_replicate 1 x dp_shard 2 = 2, but this run has 1 rank"),
        (8, 0, "auto", "dp_replicate", "dp_replicate is 0"),
        (8, 1, -1, "dp_shard", "dp_shard is -1"),
    ],
)
def test_degrees_that_do_not_multiply_are_refused_with_the_arithmetic(ranks, dp_replicate, dp_shard, argument, said):
    with pytest.raises(ConfigError) as refusal:
        degrees(ranks, dp_replicate, dp_shard, component=auto)
    assert said in str(refusal.value)
    assert refusal.value.about == (auto, argument)


def test_launch_is_read_from_the_environment():
    assert launch(PLACE) == (1, 4, 0, "node0", 29500)
    assert launch({"HOME": "/"}) is None
    assert launch({"LOCAL_RANK": "0", "MASTER_PORT": "1"}) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR missing"),
        ({"RANK": None}, "RANK missing"),
        ({"WORLD_SIZE": "", "MASTER_PORT": None}, "WORLD_SIZE, MASTER_PORT missing"),
        ({"RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        ({"RANK": "-1"}, "RANK is -1"),
        ({"LOCAL_RANK": "7"}, "LOCAL_RANK is 7"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is not a whole number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
    ],
)
def test_half_a_launch_is_refused(change, said):
    environment = {name: value for name, value in (PLACE | change).items() if value is not None}
    with pytest.raises(ConfigError) as refusal:
        launch(environment)
    assert said in str(refusal.value)
    assert "unset RANK" in refusal.value.hint


def test_one_process_is_alone(monkeypatch):
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    world = auto()
    assert (type(world).__name__, world.rank, world.size) == ("Alone", 0, 1)
    assert auto(dp_shard=1).size == 1
    with pytest.raises(ConfigError, match="this run has 1 rank"):
        auto(dp_replicate=2, dp_shard=2)
    with pytest.raises(ConfigError, match="1 ranks cannot be split"):
        auto(dp_replicate=2)


def test_globs_match_part_by_part():
    model = SmallModel()
    assert list(matching(model, ["blocks.*"])) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(matching(model, ["blocks.[01].norm", "embedding"])) == ["embedding", "blocks.0.norm", "blocks.1.norm"]
    assert matching(model, []) == {}


def test_a_glob_without_match_names_what_is_near():
    with pytest.raises(ConfigError) as refusal:
        matching(SmallModel(), ["layers.*"], component="x")
    assert "names 'layers.*', which matches none" in str(refusal.value)
    assert refusal.value.about == ("x", "model")
    with pytest.raises(ConfigError, match=r"near it: blocks\.\*"):
        matching(SmallModel(), ["block.*"])
    with pytest.raises(ConfigError, match="no submodules"):
        matching(nn.Identity(), ["*"])
