"""Held-out sets that do not divide, and the gradient noise scale: several ranks find what one does, and none waits."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modalities_core.errors import DataError
from modalities_core.interfaces import Batch, Samples
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.executor import Plain
from modalities_core.training.noise_scale import NoiseScale
from modalities_data.loading.batches import HeldOutBatches
from modalities_models.decoder import decoder
from modalities_models.losses.cross_entropy import CrossEntropy
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.world import auto

pytestmark = pytest.mark.slow

LENGTH, VOCABULARY = 12, 40
SIZES = (1, 3, 8, 13)


class Masked:
    """Random samples; about a third of the targets does not count, and of sample 2 none does."""

    sequence_length, largest_id, fingerprint = LENGTH, VOCABULARY - 1, "masked"
    bytes_per_token: float | None = 3.5

    def __init__(self, samples: int) -> None:
        random = np.random.default_rng(0)
        self.tokens = random.integers(0, VOCABULARY, (samples, LENGTH + 1), np.uint16)
        self.weights = (random.random((samples, LENGTH)) < 0.67).astype(np.float32)
        self.weights[2:3] = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def gather(self, indices: np.ndarray) -> Samples:
        return Samples(self.tokens[indices], self.weights[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        tokens, weights = (torch.from_numpy(values[indices]) for values in (self.tokens.astype(np.int64), self.weights))
        return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def measures() -> dict[str, object]:
    """What this rank finds."""
    world = auto()
    model = fsdp2(lambda: decoder("nano", vocab_size=VOCABULARY, sequence_length=LENGTH), world, param_dtype="fp32")
    executor = Plain(model, CrossEntropy(), world)
    found: dict[str, object] = {}
    for samples in SIZES:
        held_out = HeldOutBatches(Masked(samples), world, 2)
        measured = Evaluation(f"of {samples}", held_out, every=1).measure(executor, world, 0)
        assert measured is not None
        found[measured.name] = [measured.loss, measured.perplexity, measured.bits_per_byte, measured.tokens]
    try:
        Evaluation("empty", HeldOutBatches(Masked(0), world, 2), every=1).measure(executor, world, 0)
    except DataError as error:
        found["empty"] = error.message
    noise = NoiseScale(executor, world, list(model.parameters()))
    # Micro batches of four samples over all ranks, the same four for any number of ranks.
    share = 4 // world.data_size
    for step in range(3):
        first = 16 * step + share * world.data_rank
        noise.forward_backward([Masked(48).batch(np.arange(first + 4 * n, first + 4 * n + share)) for n in range(4)])
        for parameter in model.parameters():
            parameter.grad = None
    found["noise"] = noise.state()
    del executor, noise, model
    world.close()
    return found


def on_ranks(ranks: int, folder: Path) -> list[dict[str, object]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, str(folder / f"{ranks}-{rank}.json")]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return on_ranks(1, tmp_path_factory.mktemp("alone"))[0]


def test_one_rank_finds_what_a_plain_average_does(alone: dict[str, object]) -> None:
    model = decoder("nano", vocab_size=VOCABULARY, sequence_length=LENGTH).double().eval()
    for samples in SIZES:
        batch = Masked(samples).batch(np.arange(samples))
        with torch.no_grad():
            logits = model.head(model(batch.tokens_BT)).flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, batch.targets_BT.flatten(), reduction="none")
        weights = batch.weights_BT.flatten()
        loss = ((losses * weights).sum() / weights.sum()).item()
        expected = [loss, math.exp(loss), loss / math.log(2) / 3.5, int(weights.sum())]
        assert alone[f"of {samples}"] == pytest.approx(expected, rel=1e-5)
    assert "has no target that counts" in str(alone["empty"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_find_what_one_does(alone: dict[str, object], ranks: int, tmp_path: Path) -> None:
    for found in on_ranks(ranks, tmp_path):
        assert found.keys() == alone.keys()
        assert found["empty"] == alone["empty"]
        for name in [f"of {samples}" for samples in SIZES] + ["noise"]:
            assert found[name] == pytest.approx(alone[name], rel=2e-5), name


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measures()))
