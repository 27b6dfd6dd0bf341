"""Pipelines of 2 ranks, and of 2 x 2: every schedule is the whole batch in one process."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from parallel_small_model import SAMPLES, SmallModel, batch, weighted_loss
from pipeline_programs import LAYERS
from test_parallel_loop import trained

from modalities_core.errors import DataError, DistributedError
from modalities_core.training.parameters import parameter_count, tensor_layout

RELATIVE = 1e-5


@functools.cache
def reference(clip_norm):
    """Whole batches in float64, by the formulas; losses of held-out batches of 3, 4 and 1 samples."""
    model = SmallModel("none", layers=LAYERS)
    model.load_state_dict(dict(model.initial_values()))
    history, weights = trained(model.double(), 2.0, clip_norm)
    return history, weights, model


def held_out(model, data_size):
    found = []
    for rows in (3, 4, 1):
        sums = weighted_loss(
            model(batch(90, 0, rows * data_size).tokens_BT), model.head, batch(90, 0, rows * data_size)
        )
        found.append([value.item() for value in sums])
    return found


def check(cases, results, out, data_size):
    for place, case in enumerate(cases):
        clip_norm = case.get("clip_norm", 1.0)
        history, expected, model = reference(clip_norm)
        assert clip_norm is None or max(norm for _, norm in history) > clip_norm, "the clipping would not show"
        np.testing.assert_allclose(results[0][place][0], history, rtol=RELATIVE, err_msg=str(case))
        for rank, result in enumerate(results):
            np.testing.assert_allclose(result[place][1], held_out(model, data_size), rtol=RELATIVE, err_msg=str(case))
            with np.load(f"{out}-{place}-{rank}.npz") as arrays:
                assert 0 < len(arrays) < len(expected), "a rank holds some of the model"
                for name in arrays:
                    apart = np.linalg.norm(arrays[name] - expected[name]) / np.linalg.norm(expected[name])
                    assert apart < RELATIVE, f"{name} with {case}: {apart}"
        names = set()
        for rank in range(len(results)):
            with np.load(f"{out}-{place}-{rank}.npz") as arrays:
                names |= set(arrays)
        assert names == set(expected), "and together they hold all of it"


def test_a_pipeline_trains_as_one_process(on_ranks, tmp_path):
    cases = [{"size": 3, "schedule": "1f1b", "clip_norm": 0.5}]
    out = str(tmp_path / "weights")
    results = on_ranks(2, "pipeline_programs:train", cases=cases, out=out, folder=str(tmp_path), pp=2)
    check(cases, results, out, 1)


@pytest.mark.slow
def test_every_schedule_trains_as_one_process(on_ranks, tmp_path):
    cases = [
        {"size": 3, "schedule": "gpipe", "clip_norm": 0.5},
        {"size": 12, "schedule": "gpipe"},
        {"size": 2, "schedule": "1f1b", "clip_norm": None, "sharding": {"reshard_after_forward": True}},
        {"size": 3, "schedule": "interleaved_1f1b", "stages_per_rank": 2},
        {"size": 2, "schedule": "zero_bubble", "clip_norm": 0.5},
        {"size": 4, "schedule": "zero_bubble"},
        {"size": 3, "schedule": "zero_bubble", "stages_per_rank": 2},
    ]
    assert SAMPLES == 12
    out = str(tmp_path / "weights")
    results = on_ranks(2, "pipeline_programs:train", 300, cases=cases, out=out, folder=str(tmp_path), pp=2)
    check(cases, results, out, 1)


@pytest.mark.slow
def test_stages_that_are_sharded_over_data_parallel_ranks_train_as_one_process(on_ranks, tmp_path):
    cases = [
        {"size": 3, "schedule": "1f1b", "clip_norm": 0.5},
        {"size": 2, "schedule": "1f1b", "sharding": {"reshard_after_forward": True}},
        {"size": 3, "schedule": "gpipe"},
        {"size": 3, "schedule": "interleaved_1f1b", "stages_per_rank": 2, "clip_norm": 0.5},
        {"size": 3, "schedule": "zero_bubble"},
        {"size": 3, "schedule": "zero_bubble", "stages_per_rank": 2},
    ]
    out = str(tmp_path / "weights")
    results = on_ranks(4, "pipeline_programs:train", 300, cases=cases, out=out, folder=str(tmp_path), pp=2)
    check(cases, results, out, 2)


@pytest.mark.slow
def test_gradients_are_reduced_once_and_weights_gathered_once_in_a_step(on_ranks):
    cases = [
        {"size": 2},
        {"size": 3, "schedule": "interleaved_1f1b", "stages_per_rank": 2},
        {"size": 2, "schedule": "zero_bubble"},
        {"size": 2, "sharding": {"reshard_after_forward": True}},
    ]
    for found in on_ranks(4, "pipeline_programs:reductions", 300, cases=cases, pp=2):
        for (reduced, gathered, units), case in zip(found, cases, strict=True):
            assert reduced == units >= 3, case
            # Asked to free weights in between, it gathers them for every micro batch.
            assert gathered > units if "sharding" in case else gathered == units, case


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_begin_with_the_weights_of_one_process_and_know_the_whole_model(on_ranks, tmp_path, ranks):
    alone = SmallModel("none", layers=LAYERS)
    values = dict(alone.initial_values())
    found = on_ranks(ranks, "pipeline_programs:initial", out=str(tmp_path / "initial"), pp=2)
    names = set()
    for rank, known in enumerate(found):
        with np.load(tmp_path / f"initial-{rank}.npz") as arrays:
            assert len(arrays) == known["local"] < len(values)
            names |= set(arrays)
            for name in arrays:
                assert (arrays[name] == values[name].numpy()).all(), name
        assert known["count"] == parameter_count(alone)
        assert known["layout"] == {name: list(of) for name, of in tensor_layout(alone).items()}
        glob, called, plain, interleaved, few, noise, shapes = known["refusals"]
        assert "'tail.*', which matches no parameter" in glob and "28 parameters" in glob
        assert "cannot be called by itself" in called
        assert "executor.pipeline" in plain
        assert "stages_per_rank" in interleaved
        assert "at least 2 micro batches per step, but a step has 1" in few
        assert "noise_scale" in noise
        assert "(1, 9), (2, 9)" in shapes
    assert names == values.keys() - {"scale"}
    # Groups of parameters are those of the whole model: no rank finds fault with a glob for another's.
    assert [known["rates"] for known in found] == ranks // 2 * [[0.25, 1.0]] + ranks // 2 * [[0.5, 1.0]]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_on_the_last_stage_is_refused_on_all(on_ranks, tmp_path, what):
    found = on_ranks(2, "pipeline_programs:not_finite", folder=str(tmp_path), what=what, pp=2)
    assert found[0] == found[1]
    assert found[0]["same"]
    assert "NumericalError: step 3" in found[0]["said"]
    assert ("not finite on rank 1" in found[0]["said"]) == (what == "loss")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_that_fails_ends_the_others(outcomes_on_ranks, rank):
    outcomes = outcomes_on_ranks(2, "pipeline_programs:fails", seconds=60, rank=rank, pp=2)
    assert outcomes[rank]["exit_code"] == DataError.exit_code
    assert "something is wrong with this micro batch" in outcomes[rank]["log"]
    assert outcomes[1 - rank]["exit_code"] == DistributedError.exit_code
    assert f"rank {1 - rank} of 2 lost the others in a pipeline" in outcomes[1 - rank]["log"]


@pytest.mark.slow
def test_a_stage_that_hangs_is_not_waited_for_longer_than_the_world_says(outcomes_on_ranks):
    outcomes = outcomes_on_ranks(2, "pipeline_programs:hangs", seconds=5, rank=0, pp=2)
    assert outcomes[1]["exit_code"] == DistributedError.exit_code
    assert "rank 1 of 2 lost the others in a pipeline" in outcomes[1]["log"]
