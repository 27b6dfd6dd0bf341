"""Which part of a model a rank of a pipeline holds, and what cannot be cut into stages."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from parallel_small_model import SmallModel, batch
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_parallel.mesh import Degrees
from modalities_parallel.pipeline.division import divide, held_stages
from modalities_parallel.pipeline.executor import Pipeline
from modalities_parallel.pipeline.schedules import check_micro_batches, check_stages
from modalities_parallel.pipeline.staged import Stages
from modalities_parallel.pipeline.stages import keep_stages
from modalities_parallel.planning.world import Planned


class OneRank:
    """Of a pipeline, as much of a mesh as cutting a model into stages looks at."""

    mesh_dim_names = ("pp",)

    def __init__(self, place):
        self.place = place

    def get_local_rank(self, axis):
        return self.place


def cut(model, place, ranks=2, stages_per_rank=1, plan=None):
    meshes = SimpleNamespace(degrees=Degrees(pp=ranks), whole=OneRank(place))
    keep_stages(model, plan or model.parallel_plan(), meshes, stages_per_rank)
    return model


@pytest.mark.parametrize("last_extra", [0.0, 2.5, 30.0])
@pytest.mark.parametrize("costs", [[1.0] * 7, [1.0, 5.0, 2.0, 2.0, 1.0, 3.0], [4.0, 1.0, 1.0]])
def test_no_other_division_has_a_cheaper_dearest_stage(costs, last_extra):
    for stages in range(1, len(costs) + 1):
        found = divide(costs, stages, last_extra)
        assert [place for places in found for place in places] == list(range(len(costs)))
        assert all(found)

        def dearest(runs):
            sums = [sum(costs[place] for place in run) for run in runs]
            return max([*sums[:-1], sums[-1] + last_extra])

        options = []
        for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
            edges = [0, *cuts, len(costs)]
            options.append([range(a, b) for a, b in itertools.pairwise(edges)])
        assert dearest(found) == min(map(dearest, options))


def test_equal_blocks_are_shared_out_evenly():
    assert [len(run) for run in divide([1.0] * 10, 4)] == [3, 3, 2, 2]
    assert [len(run) for run in divide([1.0] * 8, 4)] == [2, 2, 2, 2]
    # A head that costs as much as two blocks takes their place.
    assert [len(run) for run in divide([1.0] * 10, 4, 2.0)] == [3, 3, 3, 1]


def test_stages_go_round_the_ranks():
    assert [held_stages(place, 3, 2) for place in range(3)] == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(("ranks", "stages_per_rank"), [(2, 1), (3, 1), (2, 2), (1, 5)])
def test_stages_one_after_the_other_are_the_model(ranks, stages_per_rank):
    alone = SmallModel("none", layers=5)
    alone.load_state_dict(dict(alone.initial_values()))
    tokens_BT = batch(0, 0, 4).tokens_BT
    parts = []
    for place in range(ranks):
        part = cut(SmallModel("none", layers=5), place, ranks, stages_per_rank)
        part.load_state_dict({name: alone.state_dict()[name] for name in part.state_dict()})
        assert set(part.state_dict()) <= set(alone.state_dict())
        parts.append(part)
    hidden_BTD = None
    for stage in range(ranks * stages_per_rank):
        part = parts[stage % ranks]
        names = list(part.state_dict())
        with part.pipeline_stages.running(stage, hidden_BTD):
            hidden_BTD = part(tokens_BT)
            assert part.pipeline_stages.ends_model == (stage == ranks * stages_per_rank - 1)
        assert list(part.state_dict()) == names
    assert torch.equal(parts[-1].head(hidden_BTD), alone.head(alone(tokens_BT)))


def test_what_is_absent_takes_no_memory_and_tells_what_it_was():
    first, last = (cut(SmallModel("none", layers=4), place) for place in range(2))
    assert {name.partition(".")[0] for name in first.state_dict()} == {"embedding", "blocks", "scale"}
    assert {name.partition(".")[0] for name in last.state_dict()} == {"norm", "head", "blocks", "scale"}
    zeros_BTD = last.embedding(batch(0, 0, 4).tokens_BT)
    assert not zeros_BTD.any() and zeros_BTD.untyped_storage().nbytes() == 4 and zeros_BTD.requires_grad
    assert last.blocks[0].qkv.out_features == first.blocks[0].qkv.out_features
    assert not hasattr(last.blocks[0], "nothing_of_that_name")


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        cut(*arguments, **keywords)
    return str(caught.value)


def test_what_cannot_be_cut_is_refused_when_it_is_built():
    assert "reads embedding.weight (tied)" in refusal(SmallModel("read"), 0)
    assert "head.weight are one parameter (tied)" in refusal(SmallModel("shared"), 0)
    assert "3 blocks, but the pipeline has 4 stages" in refusal(SmallModel("none"), 0, 2, 2)
    assert "names no blocks" in refusal(SmallModel("none"), 0, plan=ParallelPlan(embeddings=("embedding",)))
    assert "names no embeddings" in refusal(SmallModel("none"), 0, plan=ParallelPlan(blocks=("blocks.*",)))
    odd = SmallModel("none")
    odd.factor = nn.Parameter(torch.ones(()))
    assert "the parameter factor is neither inside of a block" in refusal(odd, 0)


class Twice(SmallModel):
    def forward(self, tokens_BT):
        hidden_BTD = self.embedding(tokens_BT)
        for block in [*self.blocks, self.blocks[0]]:
            hidden_BTD = block(hidden_BTD)
        return self.norm(hidden_BTD)


class Pair(SmallModel):
    def forward(self, tokens_BT):
        hidden_BTD = super().forward(tokens_BT)
        return hidden_BTD, hidden_BTD


class NormBefore(SmallModel):
    def forward(self, tokens_BT):
        hidden_BTD = self.norm(self.embedding(tokens_BT))
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return hidden_BTD


class ByKeyword(SmallModel):
    def forward(self, tokens_BT):
        hidden_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD=hidden_BTD)
        return self.norm(hidden_BTD)


def test_a_forward_that_is_none_of_stages_is_refused_when_it_runs():
    tokens_BT, received_BTD = batch(0, 0, 1).tokens_BT, torch.zeros(1, 9, 14)
    cases = (Twice, 0, "not called once each"), (Pair, 1, "gives tuple"), (NormBefore, 1, "norm of NormBefore has")
    for kind, place, says in cases:
        model = cut(kind("none"), place)
        with (
            model.pipeline_stages.running(place, received_BTD if place else None),
            pytest.raises(ConfigError) as caught,
        ):
            model(tokens_BT)
        assert says in str(caught.value)


def test_blocks_may_be_called_by_keyword():
    model = cut(ByKeyword("none"), 1)
    model.load_state_dict({name: value for name, value in model.initial_values() if name in model.state_dict()})
    received_BTD = torch.randn(1, 9, 14)
    with model.pipeline_stages.running(1, received_BTD):
        found = model(batch(0, 0, 1).tokens_BT)
    assert torch.equal(found, model.norm(model.blocks[2](received_BTD)))


def test_schedules_say_what_they_want():
    def said(check, *arguments) -> str:
        with pytest.raises(ConfigError) as caught:
            check(*arguments, None)
        return str(caught.value)

    assert "not 'fast'" in said(check_stages, "fast", 1)
    assert "1f1b works with one stage per rank" in said(check_stages, "1f1b", 2)
    assert "several stages on each rank" in said(check_stages, "interleaved_1f1b", 1)
    assert "at least 4 micro batches" in said(check_micro_batches, "1f1b", 3, 4)
    message = said(check_micro_batches, "zero_bubble", 9, 4)
    assert "9 micro batches" in message and "has 8 or 12" in message
    check_micro_batches("gpipe", 1, 4, None)
    check_micro_batches("interleaved_1f1b", 3, 4, None)


def test_the_executor_wants_a_pipeline():
    model = SmallModel("none")
    for world, says in ((Planned(Degrees(dp_shard=2)), "pp of this world is 1"), (Planned(Degrees(pp=2)), "not cut")):
        with pytest.raises(ConfigError) as caught:
            Pipeline(model, lambda *_: None, world)
        assert says in str(caught.value)


def test_stages_are_found_again_in_a_model_that_was_cut():
    stages = cut(SmallModel("none", layers=4), 1).pipeline_stages
    assert isinstance(stages, Stages)
    assert (stages.held, stages.count, stages.is_last(1)) == ((1,), 2, True)
