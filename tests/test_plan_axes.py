"""Planning of every axis of the mesh, by hand: Llama 3 8B on eight H100."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modalities_cli.plan import built
from modalities_models.decoder import decoder
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_parallel.mesh import Degrees
from modalities_parallel.planning.devices import DEVICES, exchange_seconds, gather_seconds, send_seconds
from modalities_parallel.planning.layout import Layout, rank_parts
from modalities_parallel.planning.run import PlannedRun, estimated

CONFIG = Path(__file__).resolve().parent.parent / "config_files" / "llama_1b_fsdp.yaml"
LLAMA3_8B = (
    "model.model.preset=llama3-8b",
    "model.model.vocab_size=128256",
    "settings.sequence_length=8192",
    "settings.micro_batch_size=1",
    "trainer.batches.samples_per_step=8",
)
TRACES: dict[Any, Any] = {}


def llama(*overrides: str) -> PlannedRun:
    """Llama 3 8B on eight devices; all such runs share what going through the same model shows."""
    return replace(built(CONFIG, (*LLAMA3_8B, *overrides), 8), traces=TRACES)


PARAMETERS, BLOCK, ROOT = 8_030_261_248, 218_112_000, 2 * 128256 * 4096
ACTIVATIONS = 8192 * 32 * 83_968 * 2
PIPELINE = ("trainer.executor.component=executor.pipeline", "trainer.executor.compile=blocks")


def test_tensor_parallel_llama_3_8b_by_hand() -> None:
    run = llama("world.tp=4", "trainer.batches.samples_per_step=2")
    assert (run.data_ranks, run.accumulation, run.layout.shards) == (2, 1, 2)
    estimate = estimated(run, DEVICES["h100"])
    norms = 65 * 4096
    # Norms are whole on each of the four, and all is shared between two.
    own = (PARAMETERS - norms) // 4 + norms
    assert estimate.memory.weights == estimate.memory.gradients == 4 * own // 2
    assert estimate.memory.optimizer == 2 * estimate.memory.weights
    part = (2 * 128256 * 4096) // 4 + 4096, (BLOCK - 2 * 4096) // 4 + 2 * 4096
    assert estimate.memory.gathered == 2 * (part[0] + 2 * part[1])
    # A quarter of everything, and the other three of what 64 regions are given, whole tokens of 4096 features.
    gathered = 64 * 8192 * 4096 * 2 * 3 / 4
    assert estimate.memory.activations == pytest.approx(ACTIVATIONS / 4 + gathered, rel=0.02)
    # Per block twice an all-gather and a reduce-scatter, forward and backward, and two pairs around all blocks.
    each = gather_seconds(8192 * 4096 * 2, 4, DEVICES["h100"])
    whole = estimated(llama(), DEVICES["h100"])
    assert estimate.time.compute == pytest.approx(whole.time.compute / 4)
    assert estimate.time.exposed == pytest.approx((64 * 4 + 4) * each, rel=0.1)


def test_context_parallel_llama_3_8b_by_hand() -> None:
    run = llama("world.cp=4", "trainer.batches.samples_per_step=2")
    estimate = estimated(run, DEVICES["h100"])
    # Weights are shared between all eight; what attention gave is kept on both sides of the exchange.
    assert estimate.memory.weights == 4 * PARAMETERS // 8
    assert estimate.memory.activations == pytest.approx((ACTIVATIONS + 32 * 8192 * 4096 * 2) / 4, rel=0.02)
    # Queries, keys, values and what comes of them: 4096 + 2 * 1024 + 4096 features, once forward and once backward.
    exchanged = 2 * 32 * exchange_seconds(8192 / 4 * 10240 * 2, 4, DEVICES["h100"])
    beside = estimated(llama(), DEVICES["h100"])
    assert estimate.time.compute == pytest.approx(beside.time.compute / 4)
    assert estimate.time.communication == pytest.approx(beside.time.communication + exchanged, rel=0.02)


def test_a_pipeline_of_llama_3_8b_by_hand() -> None:
    asked = (*PIPELINE, "world.pp=4", "trainer.batches.samples_per_step=32")
    run = llama(*asked)
    assert (run.data_ranks, run.accumulation, run.layout.reshard) == (2, 16, False)
    first, *_, last = parts = rank_parts(run.model, run.layout)
    embedding = 128256 * 4096
    assert [part.blocks for part in parts] == [9, 9, 8, 6]
    assert sum(one.gathered for one in first.root) == embedding and not parts[1].root
    assert sum(one.gathered for one in last.root) == embedding + 4096 and last.last
    assert sum(sum(part.costs) for part in parts) == pytest.approx(1)
    estimate = estimated(run, DEVICES["h100"])
    # The first rank has most: four micro batches under way in nine of the 32 blocks, as 1F1B begins.
    assert estimate.memory.weights == 4 * (9 * BLOCK + embedding) // 2
    assert estimate.memory.gathered == 2 * (9 * BLOCK + embedding)
    assert estimate.memory.activations == pytest.approx(4 * 9 / 32 * ACTIVATIONS, rel=0.02)
    # (p - 1) / m of the time of all micro batches, arXiv:2104.04473; messages between stages come on top.
    assert estimate.time.bubble == pytest.approx(3 / 16 * estimate.time.compute, rel=0.02)
    twice = estimated(llama(*asked, *INTERLEAVED), DEVICES["h100"])
    assert twice.time.bubble / twice.time.compute == pytest.approx(3 / 16 / 2, rel=0.03)
    assert twice.memory.activations > estimate.memory.activations
    halved = estimated(llama(*asked, "trainer.executor.schedule=gpipe"), DEVICES["h100"])
    assert halved.memory.activations == pytest.approx(16 * 9 / 32 * ACTIVATIONS, rel=0.02)


INTERLEAVED = ("trainer.executor.schedule=interleaved_1f1b", "model.stages_per_rank=2")


def test_what_is_offloaded_is_on_the_host() -> None:
    here, there = (llama(f"model.offload={on}") for on in ("false", "true"))
    device, host = estimated(here, DEVICES["h100"]), estimated(there, DEVICES["h100"])
    assert host.host == device.memory.weights + device.memory.gradients + device.memory.optimizer == 2 * PARAMETERS
    assert host.memory.total == device.memory.total - host.host
    # Weights and states are read and written by the host's memory, gradients read.
    assert host.time.optimizer == pytest.approx(PARAMETERS / 8 * (2 * 4 + 4 + 2 * 8) / 77e9)
    assert host.time.total > device.time.total


def test_units_of_several_blocks_and_gathering_ahead() -> None:
    run = llama("model.blocks_per_unit=5", "model.prefetch=2")
    (part,) = rank_parts(run.model, run.layout)
    assert [len(unit) for unit in part.units] == [5 * 9] * 6 + [2 * 9]
    assert estimated(run, DEVICES["h100"]).memory.gathered == 2 * (ROOT + 4096 + 3 * 5 * BLOCK)


def test_experts_are_shared_out_beside_what_all_ranks_hold() -> None:
    mixture = MixtureOfExperts(experts=8, experts_per_token=2, intermediate_size=512)
    with torch.device("meta"):
        model = decoder(vocab_size=512, sequence_length=256, hidden_size=128, layers=3, heads=4, feedforward=mixture)
    layout = Layout(Degrees(dp_shard=8, ep=4), True, torch.bfloat16, torch.float32, True)
    (part,) = rank_parts(model, layout)
    experts = 3 * 8 * 3 * 128 * 512
    assert sum(one.gathered for one in part.held) == sum(v.numel() for v in model.parameters()) - experts * 3 // 4
    spread = [one for one in part.held if one.parameter.ndim == 3]
    # Two of eight experts on each rank of ep, and one of them on each of the two ranks that share these.
    assert sum(one.sharded for one in spread) == experts // 8


def test_collectives_of_ranks_that_are_not_neighbours() -> None:
    h100 = DEVICES["h100"]
    # With tp 8 each of 8 shards is in another node, so a ring has one port of each.
    assert gather_seconds(1e9, 8, h100, 8) == pytest.approx(7 / 8 * 1e9 / (0.8 * 50e9) + 7 * 14e-6)
    # With tp 4 two of them share a node, and two ports.
    assert gather_seconds(1e9, 8, h100, 4) == pytest.approx(7 / 8 * 1e9 / (0.8 * 100e9) + 4 * 3.4e-6 + 3 * 14e-6)
    assert exchange_seconds(1e9, 1, h100) == 0
    assert exchange_seconds(1e9, 4, h100) == pytest.approx(3 / 4 * 1e9 / (0.8 * 450e9) + 3 * 3.4e-6)
    assert exchange_seconds(1e9, 16, h100) == pytest.approx(8 / 16 * 1e9 / (0.8 * 50e9) + 15 * 14e-6)
    assert send_seconds(1e9, 4, h100) == pytest.approx(1e9 / (0.8 * 450e9) + 3.4e-6)
    assert send_seconds(1e9, 8, h100) == pytest.approx(1e9 / (0.8 * 50e9) + 14e-6)
