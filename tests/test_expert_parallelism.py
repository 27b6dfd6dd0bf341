"""Expert parallelism of model.decoder on 2 and 4 ranks against one process, through the trainer and its checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("expert_parallelism_programs.py")
SHARED = {"shared_intermediate_size": 20, "shared_gate": True}
STRAIGHT = {"steps": 5, "model": SHARED}
OPTIONS = {
    "accumulated": {"accumulation": 2, "clip_norm": 0.3, "model": SHARED | {"score": "sigmoid"}},
    "recomputed": {"clip_norm": 0.3, "model": {"recompute": "blocks", "dense_layers": [0]}},
    "in part": {"model": SHARED | {"recompute": "selective", "tied": True}},
    "lion": {"optimizer": "lion"},
    "straight": STRAIGHT,
}
ON_TWO = {
    "accumulated": {"ep": 2},
    "recomputed": {"ep": 2},
    "in part": {"ep": 2},
    "lion": {"ep": 2},
    "accumulated, cp": {"ep": 2, "cp": 2},
}
ON_FOUR = {
    "accumulated": {"ep": 2, "dp_replicate": 2},
    "recomputed": {"ep": 2, "cp": 2},
    "in part": {"ep": 4},
    "lion": {"ep": 2},
    "accumulated, cp": {"ep": 4, "cp": 2},
}


def runs(folder: Path, ranks: int, plan: list) -> list:
    """What rank 0 says of each run; all ranks have to say it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    base |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = json.dumps({"plan": plan, "out": str(folder / f"{ranks}"), "folder": str(folder / "runs")})
    (folder / "runs").mkdir(exist_ok=True)
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = base | ({name: str(value) for name, value in place.items()} if ranks > 1 else {})
        result, log = folder / f"result-{ranks}-{rank}.json", folder / f"log-{ranks}-{rank}.txt"
        with log.open("wb") as stream:
            command = [sys.executable, str(PROGRAM), "cases", arguments, str(result)]
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        started.append((process, result, log))
    try:
        for process, _, log in started:
            assert process.wait(400) == 0, log.read_text(errors="replace")
    finally:
        for process, _, _ in started:
            process.kill()
            process.wait()
    found = [json.loads(result.read_text()) for _, result, _ in started]
    assert not any("view" in log.read_text(errors="replace") for _, _, log in started), "FSDP2 warns of nothing"
    assert all(of[place].get("held") == found[0][place].get("held") for of in found for place in range(len(plan)))
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def one(folder):
    """What one process learns."""
    found = runs(folder, 1, [[{}, options] for options in OPTIONS.values()])
    return {
        name: result | {"weights": np.load(folder / f"1-{place}.npz")}
        for place, (name, result) in enumerate(zip(OPTIONS, found, strict=True))
    }


def assert_alike(found: dict, weights, wanted: dict) -> None:
    history = wanted["history"][-len(found["history"]) :]
    np.testing.assert_allclose(found["history"], history, rtol=1e-5)
    assert found["held"] == pytest.approx(wanted["held"], rel=1e-5)
    assert weights.files == wanted["weights"].files, "names do not change"
    for name in weights.files:
        value, of_one = weights[name], wanted["weights"][name]
        if name.startswith("before."):
            # Of a run that goes on, they are those before its checkpoint was loaded.
            assert len(found["history"]) < len(wanted["history"]) or np.array_equal(value, of_one), name
        elif name.endswith("balance"):
            assert np.array_equal(value, of_one) and abs(of_one).max() >= 0.01, "every token's choice counts once"
        else:
            assert abs(value - of_one).max() <= 1e-5 * abs(of_one).max(), name


@pytest.mark.parametrize(("ranks", "meshes"), [(2, ON_TWO), (4, ON_FOUR)])
def test_ranks_that_share_experts_learn_what_one_process_learns(folder, one, ranks, meshes):
    plan = [[mesh, OPTIONS[name.removesuffix(", cp")]] for name, mesh in meshes.items()]
    for place, (name, found) in enumerate(zip(meshes, runs(folder, ranks, plan), strict=True)):
        wanted = one[name.removesuffix(", cp")]
        assert_alike(found, np.load(folder / f"{ranks}-{place}.npz"), wanted)
        parts = ranks // meshes[name].get("dp_replicate", 1)
        # Shards of small tensors are uneven, but no rank holds much more than its part.
        assert found["local"] <= 1.1 * wanted["local"] / parts


def test_a_run_goes_on_under_other_meshes(folder, one):
    """Two steps on two ranks, two on four, and the last on two again that share no experts."""
    before = 0
    for ranks, mesh, steps in ((2, {"ep": 2}, 2), (4, {"ep": 2}, 4), (2, {}, 5)):
        (found,) = runs(folder, ranks, [[mesh, STRAIGHT | {"steps": steps, "save": 2, "folder": "moved"}]])
        np.testing.assert_allclose(found["history"], one["straight"]["history"][before:steps], rtol=1e-5)
        before = steps
    assert_alike(found, np.load(folder / "2-0.npz"), one["straight"])


def test_stages_of_a_pipeline_share_the_experts_they_have(folder, one):
    (found,) = runs(folder, 4, [[{"ep": 2, "pp": 2}, OPTIONS["accumulated"] | {"pipeline": True}]])
    np.testing.assert_allclose(found["history"], one["accumulated"]["history"], rtol=1e-5)
    assert found["held"] == pytest.approx(one["accumulated"]["held"], rel=1e-5)
    weights, wanted = np.load(folder / "4-0.npz"), one["accumulated"]["weights"]
    assert "blocks.0.feedforward.down" in weights and "blocks.1.feedforward.down" not in weights, "of the first stage"
    for name in weights.files:
        assert abs(weights[name] - wanted[name]).max() <= 1e-5 * abs(wanted[name]).max(), name


def test_what_cannot_be_is_refused(folder):
    plan = [[{"ep": 2}, {"compile": "blocks"}], [{"ep": 2}, {"model": {"experts": 3}}]]
    messages = (
        "blocks cannot be compiled: how many rows travel",
        "the 3 experts of blocks.0.feedforward cannot be shared out among ep 2 ranks",
    )
    for result, message in zip(runs(folder, 2, plan), messages, strict=True):
        kind, text = result["refusal"]
        assert kind == "ConfigError" and message in text
