"""Tensor and context parallelism learn what one process learns from the same samples."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modalities_core.training.world import Alone

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import tensor_parallel_programs as programs  # noqa: E402

NEAR = 1e-5
CASES = {
    2: [
        ({"tp": 2}, "llama", {}),
        ({"tp": 2}, "tied", {"documents": True}),
        ({"tp": 2}, "biases", {"accumulation": 2, "odd": 15}),
        ({"tp": 2}, "heads normed", {"recompute": "blocks"}),
        ({"tp": 2}, "projection normed", {"optimizer": "sgd"}),
        ({"tp": 2}, "sandwich", {"recompute": "selective"}),
        ({"tp": 2}, "experts", {"accumulation": 2}),
        ({"tp": 2}, "llama", {"compile": "blocks"}),
        ({"cp": 2}, "llama", {"optimizer": "sgd"}),
        ({"cp": 2}, "tied", {"documents": True, "accumulation": 2}),
        ({"cp": 2}, "biases", {}),
        ({"cp": 2}, "projection normed", {"recompute": "blocks"}),
        ({"cp": 2}, "sandwich", {}),
        ({"cp": 2}, "experts", {}),
        ({"cp": 2}, "heads normed", {"compile": "blocks"}),
    ],
    4: [
        ({"tp": 2}, "llama", {"documents": True}),
        ({"tp": 2, "dp_replicate": 2}, "biases", {"accumulation": 2}),
        ({"tp": 2, "dp_replicate": 2}, "experts", {"odd": 13}),
        ({"tp": 4}, "heads normed", {"odd": 14}),
        ({"tp": 2, "cp": 2}, "tied", {"documents": True}),
        ({"tp": 2, "cp": 2}, "projection normed", {"accumulation": 2}),
        ({"cp": 4}, "projection normed", {}),
        ({"cp": 2, "dp_replicate": 2}, "sandwich", {}),
    ],
}
HUGGINGFACE = ["llama", "qwen3", "gemma3_text", "gpt_neox", "starcoder2", "cohere"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def launch(folder, ranks, cases):
    """What every rank's histories are, and the file of each case's weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    arguments = json.dumps({"plan": cases, "out": str(folder / "weights")})
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()
        }
        environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, programs.__file__, "cases", arguments, str(folder / f"{rank}.json")]
        with (folder / f"{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(ranks))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@functools.cache
def _alone(model, options):
    options = json.loads(options)
    # How many blocks are recomputed or compiled does not matter to one process.
    return programs.train(
        Alone(), model, **{key: value for key, value in options.items() if key not in ("compile", "recompute")}
    )


def off(found, expected):
    """The largest difference, relative to the largest value or the learning rate."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-2))


def compare(folder, ranks, cases, near=NEAR):
    told = launch(folder, ranks, cases)
    assert all(histories == told[0] for histories in told)
    for place, (_, model, options) in enumerate(cases):
        history, before, after = _alone(model, json.dumps({**options, "param_dtype": "fp32"}))
        np.testing.assert_allclose(told[0][place], history, rtol=near, err_msg=str(cases[place]))
        found = np.load(folder / f"weights-{place}.npz")
        for name, value in before.items():
            np.testing.assert_array_equal(found[f"before.{name}"], value, err_msg=f"{cases[place]} {name}")
        if near == NEAR:
            far = {name: off(found[name], value) for name, value in after.items() if off(found[name], value) > near}
            assert not far, (cases[place], far)


@pytest.mark.parametrize("ranks", CASES)
def test_what_ranks_learn_is_what_one_process_learns(tmp_path, ranks):
    compare(tmp_path, ranks, CASES[ranks])


def test_bfloat16_learns_about_the_same(tmp_path):
    options = {"param_dtype": "bf16", "accumulation": 2}
    compare(tmp_path, 2, [({"tp": 2}, "tied", options), ({"cp": 2}, "biases", options)], near=1e-2)


def test_models_of_transformers_are_split_as_their_classes_say(tmp_path):
    pytest.importorskip("transformers")
    cases = [({"tp": 2}, f"huggingface {family}", {"optimizer": "sgd"}) for family in HUGGINGFACE]
    compare(tmp_path, 2, cases)
