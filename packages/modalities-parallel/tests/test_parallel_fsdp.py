"""FSDP2's options change what is gathered when, never what is computed: the oracle is the single process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parallel_small_model import SmallModel
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.training.world import Alone
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.materialize import materialize
from modalities_parallel.sharding import units_of

RELATIVE = 1e-5
CASES = [
    {"accumulation": 2},
    {"accumulation": 2, "blocks_per_unit": 2},
    {"blocks_per_unit": 8, "tie": "none"},
    {"accumulation": 2, "prefetch": 2, "layers": 5},
    {"accumulation": 2, "prefetch": 1, "blocks_per_unit": 2, "layers": 5, "recomputed": True},
    {"accumulation": 2, "reshard_after_forward": False, "offload": True},
    {"accumulation": 2, "offload": True, "really_offload": True},
]


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def compare(on_ranks, tmp_path, cases, **degrees):
    from fsdp_programs import run

    alone = run(cases, str(tmp_path / "one"))
    many = on_ranks(2, "fsdp_programs:run", cases=cases, out=str(tmp_path / "many"), **degrees)[0]
    for place, (case, one, found) in enumerate(zip(cases, alone, many, strict=True)):
        np.testing.assert_allclose(found["history"], one["history"], rtol=RELATIVE, err_msg=str(case))
        with np.load(tmp_path / f"one-{place}.npz") as expected, np.load(tmp_path / f"many-{place}.npz") as arrays:
            for name in expected:
                np.testing.assert_allclose(arrays[name], expected[name], rtol=RELATIVE, atol=RELATIVE, err_msg=name)
    return many


@pytest.mark.slow
def test_options_change_nothing_but_what_is_sent(on_ranks, tmp_path):
    many = compare(on_ranks, tmp_path, CASES)
    assert all(found["local"] < 0.6 * found["whole"] for found in many)
    # An evaluation before the step leaves the root and the last unit gathered. With two micro batches of n other units,
    # the first gathers 2 n, the second the root, the last one and 2 n again; only the second reduces.
    gathered = [found["sent"].get("all_gather", 0) for found in many]
    assert gathered == [2 + 4 * n for n in (2, 1)] + [0] + [2 + 4 * n for n in (4, 2)] + [4, 10]
    assert [found["sent"]["reduce_scatter"] for found in many] == [4, 3, 2, 6, 4, 4, 4]
    assert [len(found["said"]) for found in many] == [0, 0, 0, 0, 0, 1, 0]
    assert "offload changes nothing on this cpu" in many[5]["said"][0]


@pytest.mark.slow
def test_copies_of_the_whole_model_only_reduce_and_once_per_step(on_ranks, tmp_path):
    cases = [{"accumulation": 1}, {"accumulation": 3}, {"accumulation": 3, "blocks_per_unit": 3}]
    many = compare(on_ranks, tmp_path, cases, dp_replicate=2)
    assert all(found["local"] == found["whole"] for found in many)
    # One sum of loss and norm, and the gradients of three blocks or one unit of them, and of the root.
    assert [found["sent"] for found in many] == [{"all_reduce": 1 + 4}, {"all_reduce": 1 + 4}, {"all_reduce": 1 + 2}]


def test_blocks_of_a_unit_are_neighbours_of_one_stack():
    blocks = {f"text.{n}": nn.Linear(1, 1) for n in range(5)} | {f"image.{n}": nn.Linear(1, 1) for n in range(3)}
    names = {block: name for name, block in blocks.items()}

    def units(size):
        return [[names[block] for block in unit] for unit in units_of(blocks, size)]

    assert units(1) == [[name] for name in blocks]
    assert units(2) == [["text.0", "text.1"], ["text.2", "text.3"], ["text.4"], ["image.0", "image.1"], ["image.2"]]
    assert [len(unit) for unit in units(9)] == [5, 3]
    # What a pipeline gave to other ranks parts its neighbours.
    blocks |= {"text.0": nn.Identity(), "text.2": nn.Identity()}
    names = {block: name for name, block in blocks.items()}
    assert units(4) == [["text.1"], ["text.3", "text.4"], ["image.0", "image.1", "image.2"]]


@pytest.mark.parametrize(("argument", "value"), [("blocks_per_unit", 0), ("prefetch", -1)])
def test_numbers_that_are_too_small_are_refused(argument, value):
    with pytest.raises(ConfigError, match=f"{argument} is {value}, but has to be at least") as refusal:
        fsdp2(SmallModel, Alone(), **{argument: value})
    assert refusal.value.about == (fsdp2, argument)


def test_offloading_moves_parameters_to_the_host_and_leaves_buffers_on_the_device():
    with torch.device("meta"):
        model = SmallModel("shared")
    # There is no GPU at test time, but the meta device is another one than the host as well.
    materialize(model, torch.device("meta"), offload=True)
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    assert {value.device.type for value in model.buffers()} == {"meta"}
    assert model.head.weight is model.embedding.weight
