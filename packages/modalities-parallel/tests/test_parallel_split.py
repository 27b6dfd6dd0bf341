"""Tensor and context parallelism of a model that only declares its plan, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from parallel_split_model import PLAN, SplitModel, batch, weighted_loss
from split_programs import train, update

from modalities_core.errors import ConfigError
from modalities_core.training.executor import Plain
from modalities_core.training.world import Alone
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.mesh import degrees
from modalities_parallel.tensor.layers import find_layers
from modalities_parallel.tensor.refusals import refuse

HEADS = [
    ({"tp": 2}, "linear"),
    ({"tp": 2}, "tied"),
    ({"tp": 2}, "biased"),
    ({"tp": 2}, "own"),
    ({"cp": 2}, "tied"),
    ({"cp": 2}, "own"),
]
UPDATES = [({"tp": 2}, name) for name in ("adamw", "adamw bf16", "adamw int8", "sgd", "lion", "muon", "muon bf16")] + [
    ({"tp": 2, "dp_replicate": 2}, "muon"),
    ({"tp": 2, "dp_replicate": 2}, "adamw bf16"),
]


@pytest.mark.slow
def test_any_head_gives_what_it_gives_in_one_process(on_ranks, tmp_path):
    told = on_ranks(2, "split_programs:heads", timeout=500, cases=HEADS, out=str(tmp_path / "after"))
    assert told[0] == told[1]
    for place, (_, head) in enumerate(HEADS):
        history, after = train(Alone(), head)
        np.testing.assert_allclose(told[0][place], history, rtol=1e-5, err_msg=str(HEADS[place]))
        found = np.load(tmp_path / f"after-{place}.npz")
        for name, value in after.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=f"{HEADS[place]} {name}")


@pytest.mark.slow
def test_optimizers_do_to_parts_what_they_do_to_the_whole(on_ranks, tmp_path):
    on_ranks(4, "split_programs:optimizers", timeout=500, cases=UPDATES, out=str(tmp_path / "after"))
    for place, (_, name) in enumerate(UPDATES):
        found = np.load(tmp_path / f"after-{place}.npz")
        for parameter, value in update(Alone(), name).items():
            np.testing.assert_array_equal(found[parameter], value, err_msg=f"{UPDATES[place]} {parameter}")


@pytest.mark.slow
def test_samples_that_cannot_be_cut_are_refused_in_training_only(on_ranks):
    told, other = on_ranks(2, "split_programs:refusals", timeout=300)
    assert told == other
    odd, even, evaluated, by_tp, odd_by_cp, even_by_cp, cut, by_cp, eight = told
    assert odd == odd_by_cp == [2, 7, 16]
    assert even == even_by_cp == [2, 8, 16]  # all of it to whoever does not ask for a loss
    model, sample = fsdp2(SplitModel, Alone(), param_dtype="fp32"), batch(0, slice(0, 2), length=7)
    assert evaluated == pytest.approx(Plain(model, weighted_loss, Alone()).evaluate(sample).loss.item())
    assert "samples of 7 tokens cannot be cut into the 2 equal parts of tp = 2" in by_tp
    assert "such as 8" in by_tp
    assert "of cp = 2" in by_cp
    assert cut == by_cp  # the loss takes the targets of a part
    assert "the rows of blocks.0.wide.down.weight are cut into parts of 160 values" in eight


@pytest.mark.parametrize(
    ("asked", "plan", "message", "hint"),
    [
        ({"tp": 8}, {}, "the 4 heads that blocks.0.attention.output takes cannot be shared out among tp 8", "1, 2, 4"),
        ({"tp": 2, "cp": 4}, {}, "cannot be shared out among tp 2 x cp 4 ranks", "tp x cp must divide 4: 1, 2, 4"),
        ({"tp": 4}, {"attention": ()}, "the 6 features of blocks.0.wide.stack_in cannot be split", "1, 2, 3, 6"),
        ({"tp": 2, "ep": 2, "dp_shard": 2}, {}, "shared out (ep 2) and split (tp 2)", "set tp or ep to 1"),
        ({"tp": 2}, {"column": ()}, "tp is 2, but the parallel plan of SplitModel has no column", "set tp to 1"),
        ({"tp": 2}, {"embeddings": ()}, "has no embeddings", "set tp to 1"),
        ({"cp": 2}, {"attention": ()}, "cp is 2, but the parallel plan of SplitModel has no attention", "set cp to 1"),
        ({"cp": 2}, {"head_size": None}, "has no head_size", "set cp to 1"),
    ],
)
def test_what_cannot_be_split_is_refused_when_it_is_built(asked, plan, message, hint):
    along = degrees(np.prod([n for axis, n in asked.items() if axis != "ep"]), **{"dp_shard": 1} | asked)
    with torch.device("meta"):
        model = SplitModel(plan=dataclasses.replace(PLAN, **plan))
    layers = find_layers(model, model.parallel_plan())
    with pytest.raises(ConfigError) as caught:
        refuse(model, model.parallel_plan(), layers, along, None)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_vocabulary_that_does_not_divide_can_be_rounded_up():
    with torch.device("meta"):
        model = SplitModel()
        model.embedding = torch.nn.Embedding(63, 16)
    with pytest.raises(ConfigError, match=r"the 63 rows of embedding.weight cannot be split over tp 2 ranks") as caught:
        refuse(model, PLAN, find_layers(model, PLAN), degrees(2, tp=2), None)
    assert "vocab_multiple: 2" in caught.value.hint


def test_a_glob_that_matches_nothing_is_refused():
    plan = dataclasses.replace(PLAN, row=("blocks.*.attention.outptu",))
    with torch.device("meta"), pytest.raises(ConfigError, match="outptu.*matches none"):
        find_layers(SplitModel(), plan)
