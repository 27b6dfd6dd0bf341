"""Pipelines of 2 ranks, and of 2 x 2: every schedule is the whole batch in one process."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from parallel_small_model import SAMPLES, SmallModel, batch, weighted_loss
from pipeline_programs import LAYERS
from test_parallel_loop import trained

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


def test_every_schedule_trains_as_one_process(on_ranks, tmp_path):
    cases = [
        {"size": 3, "schedule": "gpipe", "clip_norm": 0.5},
        {"size": 12, "schedule": "gpipe"},
        {"size": 3, "schedule": "1f1b", "clip_norm": 0.5},
        {"size": 2, "schedule": "1f1b", "clip_norm": None, "sharding": {"reshard_after_forward": True}},
        {"size": 3, "schedule": "interleaved_1f1b", "stages_per_rank": 2},
        {"size": 2, "schedule": "zero_bubble", "clip_norm": 0.5},
        {"size": 3, "schedule": "zero_bubble", "stages_per_rank": 2},
    ]
    out = str(tmp_path / "weights")
    results = on_ranks(2, "pipeline_programs:train", cases=cases, out=out, folder=str(tmp_path), pp=2)
    check(cases, results, out, 1)
    assert SAMPLES == 12


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
    results = on_ranks(4, "pipeline_programs:train", cases=cases, out=out, folder=str(tmp_path), pp=2)
    check(cases, results, out, 2)
