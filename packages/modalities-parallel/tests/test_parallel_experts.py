"""Expert parallelism of a plugin's experts, which only declare what they are, against one process."""

from __future__ import annotations

import pytest
import torch
from experts_programs import ExpertModel, train

from modalities_core.errors import ConfigError
from modalities_core.training.world import Alone
from modalities_parallel.experts import refuse, spread
from modalities_parallel.mesh import Meshes, degrees

COUNTS = {
    "some to all": [[3, 1, 2, 4], [2, 2, 5, 1]],
    "a rank gets none": [[3, 4, 0, 0], [1, 2, 0, 0]],
    "a rank has none": [[0, 0, 0, 0], [0, 2, 3, 0]],
    "all cross over": [[0, 0, 0, 5], [7, 0, 0, 0]],
    "none at all": [[0, 0, 0, 0], [0, 0, 0, 0]],
}


def test_rows_find_their_experts_and_come_back(on_ranks):
    for rank, sizes in enumerate(on_ranks(2, "experts_programs:dispatch", cases=list(COUNTS.values()))):
        assert sizes == [sum(counts[rank]) for counts in COUNTS.values()]


@pytest.mark.slow
def test_rows_find_their_experts_on_four_ranks(on_ranks):
    counts = [[0, 6, 0, 1], [0, 0, 0, 0], [2, 3, 0, 4], [0, 5, 0, 0]]
    assert on_ranks(4, "experts_programs:dispatch", timeout=300, cases=[counts]) == [[7], [0], [9], [5]]


def assert_alike(found, wanted):
    for (loss, norm), (loss_of_one, norm_of_one) in zip(found["history"], wanted["history"], strict=True):
        assert loss == pytest.approx(loss_of_one, rel=1e-5)
        assert norm == pytest.approx(norm_of_one, rel=1e-5), "each gradient counts once, whatever mesh it is on"
    assert found["whole"].keys() == wanted["whole"].keys()
    for name, value in wanted["whole"].items():
        torch.testing.assert_close(torch.tensor(found["whole"][name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_a_plugins_experts_learn_what_they_learn_in_one_process(on_ranks):
    wanted = train(Alone())
    assert wanted["local"]["model.blocks.0.experts.factors"] == [4, 14]
    for (found,) in on_ranks(2, "experts_programs:trainings", meshes=[{"ep": 2}]):
        assert_alike(found, wanted)
        assert found["local"]["model.blocks.0.experts.factors"] == [2, 14]


@pytest.mark.slow
def test_a_plugins_experts_on_four_ranks(on_ranks):
    wanted = train(Alone())
    meshes = [{"ep": 2}, {"ep": 4}, {"ep": 2, "dp_replicate": 2}]
    for found in on_ranks(4, "experts_programs:trainings", timeout=300, meshes=meshes):
        for of_mesh, rows in zip(found, (1, 1, 2), strict=True):
            assert_alike(of_mesh, wanted)
            assert of_mesh["local"]["model.blocks.0.experts.factors"] == [rows, 14]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 5}, "the 5 experts of blocks.0.experts cannot be shared out among ep 2 ranks"),
        ({"fault": "no experts"}, "ep is 2, but the parallel plan of ExpertModel has no experts"),
        ({"fault": "parameter"}, "its own parameter more is not among its expert_parameters"),
        ({"fault": "module"}, "a Linear, cannot be shared out: it has no expert_parameters and apply_experts"),
        ({"fault": "glob"}, "names 'blocks.*.expert', which matches none of its modules"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_out_is_refused_when_it_is_built(options, message):
    meshes = Meshes(degrees(2, ep=2), None, None, None)
    with torch.device("meta"):
        model = ExpertModel(**{"fault": "none"} | options)
    with pytest.raises(ConfigError) as caught:
        spread(model, model.parallel_plan(), meshes)
    assert message in str(caught.value)


def test_experts_are_not_split_as_well():
    with torch.device("meta"):
        model = ExpertModel()
    with pytest.raises(ConfigError, match=r"shared out \(ep 2\) and split \(tp 2\)"):
        refuse(model, model.parallel_plan(), {}, degrees(4, tp=2, ep=2))
