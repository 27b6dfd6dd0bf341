"""What ``modalities plan`` says a rank holds, beside what ranks of such a mesh really hold."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor

from modalities_core.interfaces import Batch, Model
from modalities_core.training.parameters import as_module
from modalities_models.decoder import decoder
from modalities_models.losses.cross_entropy import CrossEntropy
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.mesh import PIPELINE, SHARD, degrees, device_meshes, place_along
from modalities_parallel.planning.layout import Layout, rank_parts
from modalities_parallel.planning.split import StepShape, rank_share
from modalities_parallel.planning.trace import trace
from modalities_parallel.planning.traffic import watched
from modalities_parallel.world import auto

pytestmark = pytest.mark.slow

SMALL = {"vocab_size": 500, "sequence_length": 256, "hidden_size": 128, "layers": 5, "heads": 8, "key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixture": {"feedforward": MixtureOfExperts(experts=4, experts_per_token=2, intermediate_size=48)},
}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("dense", {"dp_shard": 4}, 1),
    ("dense", {"dp_replicate": 2}, 1),
    ("dense", {"tp": 2}, 1),
    ("dense", {"tp": 4}, 1),
    ("dense", {"cp": 4}, 1),
    ("dense", {"cp": 2, "tp": 2}, 1),
    ("dense", {"pp": 2}, 1),
    ("dense", {"dp_shard": 1, "pp": 2, "tp": 2}, 1),
    ("dense", {"pp": 2}, 2),
    ("mixture", {"tp": 2}, 1),
    ("mixture", {"ep": 2}, 1),
    ("mixture", {"cp": 2, "ep": 4}, 1),
]


def built(name: str) -> Model:
    return decoder(**SMALL, attention="sdpa", **MODELS[name])


def layout(found: Any, stages_per_rank: int) -> Layout:
    return Layout(found, True, torch.float32, torch.float32, True, stages_per_rank=stages_per_rank)


def held() -> list[dict[str, Any]]:
    """Elements and activations that this rank has, for each case."""
    world: Any = auto(timeout_seconds=120)
    results = []
    for name, asked, stages_per_rank in CASES:
        found = degrees(world.size, **asked)
        world.meshes = device_meshes("cpu", found)
        model = fsdp2(lambda name=name: built(name), world, param_dtype="fp32", stages_per_rank=stages_per_rank)
        module = as_module(model)
        elements = sum(value.to_local().numel() for value in module.parameters())
        places = [place_along(world.meshes.whole, axis) for axis in (PIPELINE, SHARD)]
        shard = place_along(world.meshes.weights, SHARD)
        results.append({"elements": elements, "stage": places[0], "shard": shard})
        if found.pp == 1:
            results[-1]["activations"] = kept(model)
    world.close()
    return results


def kept(model: Model) -> int:
    """Bytes that autograd keeps of a forward, weights left out."""
    module, sizes = as_module(model), {}

    def keep(tensor: Tensor) -> Tensor:
        weights = (getattr(value, "_local_tensor", value) for value in module.parameters())
        if tensor.untyped_storage().data_ptr() not in {one.untyped_storage().data_ptr() for one in weights}:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens_BT = torch.randint(SMALL["vocab_size"], (2, SMALL["sequence_length"]))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(tokens_BT)
    sizes[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage().nbytes()
    return sum(sizes.values())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(4):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        processes.append(subprocess.Popen([sys.executable, __file__, str(folder / f"{rank}.json")], env=environment))
    try:
        assert [process.wait(timeout=280) for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("place", range(len(CASES)), ids=[f"{name} {asked}" for name, asked, _ in CASES])
def test_parameters_and_activations_of_a_rank(ranks: list[list[dict[str, Any]]], place: int) -> None:
    name, asked, stages_per_rank = CASES[place]
    found = degrees(4, **asked)
    with torch.device("meta"):
        model = built(name)
        tokens_BT = torch.empty(2, SMALL["sequence_length"], dtype=torch.int64)
    how = layout(found, stages_per_rank)
    parts = rank_parts(model, how)
    with watched(model) as watch:
        traced = trace(model, CrossEntropy(), Batch(tokens_BT, tokens_BT))
    for result in (one[place] for one in ranks):
        part = parts[result["stage"]]
        elements = sum(one.sharded for one in part.held)
        # The first of the ranks that share a parameter has the most of its rows.
        assert result["elements"] <= elements
        if result["shard"] == 0:
            assert result["elements"] == elements
        if "activations" in result:
            share = rank_share(traced, watch.traffic(), how, part, SMALL["layers"], StepShape(1, False, False))
            assert result["activations"] == pytest.approx(share.activations, rel=0.05)
    total = sum(result["elements"] for result in (one[place] for one in ranks)) / found.dp_replicate
    whole = sum(value.numel() for value in as_module(model).parameters())
    assert whole <= total <= (whole if found.tp == 1 else found.tp * whole)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(held()))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that tears itself down
