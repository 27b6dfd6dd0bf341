from __future__ import annotations

import numpy as np
import pytest
from parallel_small_model import SmallModel
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.training.plan import matching
from modalities_parallel.environment import launch
from modalities_parallel.mesh import Degrees, degrees
from modalities_parallel.planning.world import FEWEST, Planned, planning
from modalities_parallel.world import auto, one_process

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


@pytest.mark.parametrize("axis", ["pp", "dp_replicate", "dp_shard", "cp", "tp"])
def test_any_one_axis_takes_the_ranks_that_are_left(axis):
    others = {"pp": 2, "dp_replicate": 2, "dp_shard": 3, "cp": 2, "tp": 4}
    found = degrees(96 // others[axis] * 5, **(others | {axis: "auto"}))
    assert found._asdict() == others | {axis: 5, "ep": 1}
    assert found.ranks == 96 // others[axis] * 5 and found.shards == found.dp_shard * found.cp


def test_experts_are_shared_out_within_the_ranks_of_the_weights():
    assert degrees(16, dp_shard="auto", cp=2, tp=2, ep=8) == Degrees(1, 1, 4, 2, 2, 8)
    with pytest.raises(ConfigError) as refusal:
        degrees(16, dp_shard="auto", cp=2, tp=2, ep=3, component=auto)
    assert "ep is 3, but experts are shared out among the dp_shard 4 x cp 2 = 8 ranks" in str(refusal.value)
    assert "ep must divide 8: 1, 2, 4, 8" in refusal.value.hint
    assert refusal.value.about == (auto, "ep")


@pytest.mark.parametrize(
    ("asked", "argument", "said"),
    [
        ({"tp": 3}, "tp", "16 ranks cannot be split into tp = 3 equal groups"),
        ({"tp": 4, "pp": 3}, "pp", "pp 3 x tp 4 = 12 does not divide the 16 ranks of this run"),
        ({"tp": "auto"}, "tp", "dp_shard and tp are auto, but only one degree can be what is left"),
        ({"dp_shard": 2, "cp": "auto", "pp": "auto"}, "cp", "pp and cp are auto"),
        ({"dp_shard": 2, "tp": 2, "cp": 2}, "dp_shard", "dp_replicate 1 x dp_shard 2 x cp 2 x tp 2 = 8, but this run"),
        ({"dp_shard": 2, "pp": 2, "tp": 8}, "dp_shard", "pp 2 x dp_replicate 1 x dp_shard 2 x tp 8 = 32, but this run"),
        ({"cp": 0}, "cp", "cp is 0, but a degree is at least 1"),
        ({"ep": 0}, "ep", "ep is 0, but a degree is at least 1"),
    ],
)
def test_the_arithmetic_of_all_axes_is_shown(asked, argument, said):
    with pytest.raises(ConfigError) as refusal:
        degrees(16, component=auto, **asked)
    assert said in str(refusal.value)
    assert refusal.value.about == (auto, argument)


CASES = [
    {"dp_replicate": 2},
    {"tp": 2},
    {"cp": 2},
    {"pp": 2},
    {"cp": 4, "ep": 4},
    {"dp_replicate": 2, "cp": 2, "ep": 2},
    {"dp_shard": 1, "cp": 2, "tp": 2, "ep": 2},
    {"dp_shard": 1, "pp": 2, "tp": 2},
]


def neighbours(rank, sizes):
    """Ranks along each axis through ``rank`` in a grid numbered with the last axis fastest."""
    grid = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
    place = np.argwhere(grid == rank)[0]
    lines = {}
    for axis, name in enumerate(sizes):
        along = list(place)
        along[axis] = slice(None)
        lines[name] = grid[tuple(along)].tolist()
    return lines, dict(zip(sizes, place.tolist(), strict=True))


@pytest.mark.slow
def test_which_ranks_share_which_axis(on_ranks):
    results = on_ranks(4, "mesh_programs:meshes", cases=CASES)
    for rank, result in enumerate(results):
        for case, found in zip(CASES, result["meshes"], strict=True):
            d = degrees(4, **case)
            whole, place = neighbours(rank, {name: getattr(d, name) for name in d._fields if name != "ep"})
            outer = {"pp": d.pp, "dp_replicate": d.dp_replicate}
            weights, _ = neighbours(rank, outer | {"dp_shard": d.dp_shard * d.cp, "tp": d.tp})
            experts, _ = neighbours(rank, outer | {"dp_shard": d.shards // d.ep, "ep": d.ep, "tp": d.tp})
            assert found["data_rank"] == place["dp_replicate"] * d.dp_shard + place["dp_shard"], case
            assert found["sequence_rank"] == place["cp"], case
            assert found["sharding"] == (["dp_replicate", "dp_shard"] if d.dp_replicate > 1 else ["dp_shard"])
            for name, expected in (("whole", whole), ("weights", weights), ("experts", experts)):
                if name == "experts" and d.ep == 1:
                    assert found[name] is None
                    continue
                kept = {axis: ranks for axis, ranks in expected.items() if len(ranks) > 1 or axis.startswith("dp")}
                assert found[name] == kept, (case, name)
        alone, half = result["refusals"]
        assert alone.startswith("4 ranks would each train their own copy of embedding.weight, ")
        assert "shared between 2 ranks, but 4 train them (dp_replicate 1 x dp_shard 4)" in half


def test_a_model_without_sharding_is_refused_with_what_does_not_happen():
    planned = Planned(Degrees(pp=2, dp_shard=2, cp=2, tp=4))
    assert (planned.size, planned.data_size, planned.sequence_size) == (32, 2, 2)
    with pytest.raises(ConfigError) as refusal:
        planned.check(SmallModel())
    assert "32 ranks would each train their own copy of the model: nothing reduces" in str(refusal.value)
    assert "splits its matrix products along tp 4" in str(refusal.value)
    assert "cuts its samples along cp 2" in str(refusal.value)
    assert "shares out its blocks along pp 2" in str(refusal.value)
    assert "parallel.fsdp2" in refusal.value.hint
    Planned(Degrees()).check(SmallModel())


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


def test_in_one_process_every_mesh_is_this_process(monkeypatch):
    monkeypatch.setenv("RANK", "0")  # half a launch, which is otherwise refused
    with one_process():
        world = auto(tp=4, pp=2, dp_shard=3)
    assert (type(world).__name__, world.size) == ("Alone", 1)
    with pytest.raises(ConfigError):
        auto(tp=4)


@pytest.mark.parametrize(
    ("asked", "ranks"),
    [({}, 1), ({"tp": 2, "pp": 4}, 8), ({"ep": 6, "cp": 4}, 12), ({"dp_shard": 3, "cp": "auto", "dp_replicate": 2}, 6)],
)
def test_as_few_ranks_as_a_mesh_needs(asked, ranks):
    with planning(FEWEST):
        assert auto(**asked).size == ranks
    with pytest.raises(ConfigError), planning(-1):
        pass
